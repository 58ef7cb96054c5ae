"""OpenAssistant's trees of messages: ranked answers to a conversation, and the best conversation of a tree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from align.data.faults import LeftOut, RowFault, show
from align.data.messages import number, optional_text, text
from align.data.readers import RawRow
from align.data.rows import Message
from align.data.shapes import Item, Parsed

Group = Sequence[tuple[int, Item]]
"""The messages of a tree with the numbers of their rows."""
Made = Iterable[tuple[int, Parsed | RowFault]]


def checked_message(row: RawRow) -> tuple[str, Item]:
    """The tree of a message; what is kept of it: id, parent, speaker, text, rank (0 the best, None without one)."""
    identity, said = text(row, "message_id"), text(row, "text")
    if row.get("deleted") in (True, "true", "True"):
        raise LeftOut("deleted", "the message was deleted")
    if row.get("tree_state") not in (None, "ready_for_export"):
        raise LeftOut("unfinished tree", f"its tree is in the state {show(row['tree_state'])}")
    role = {"prompter": "user", "assistant": "assistant"}.get(text(row, "role"))
    if role is None:
        raise RowFault("unknown role", f"`role` is {show(row['role'])}", "roles are `prompter`, `assistant`")
    rank = None if row.get("rank") in (None, "") else number(row, "rank")
    return text(row, "message_tree_id"), (identity, optional_text(row, "parent_id"), role, said, rank)


def _paths(group: Group) -> dict[str, list[int] | None]:
    """For each message of a tree, the positions from the root to it; None when one of them is not in the file."""
    positions = {item[0]: position for position, (_, item) in enumerate(group)}
    paths: dict[str, list[int] | None] = {}
    for identity in positions:
        path, at = [], identity
        while at in positions and positions[at] not in path:
            path.insert(0, positions[at])
            at = group[positions[at]][1][1]
        paths[identity] = path if at is None else None
    return paths


def _lost(group: Group, paths: Mapping[str, list[int] | None]) -> Iterable[tuple[int, RowFault]]:
    for place, item in group:
        if paths[item[0]] is None:
            yield place, LeftOut("lost message", "a message that it answers was left out or is not in the file")


def ranked_answers(group: Group) -> Made:
    """The ranked answers to each message of the user."""
    paths = _paths(group)
    yield from _lost(group, paths)
    for identity, path in paths.items():
        answers = [(place, item) for place, item in group if item[1] == identity and item[2] == "assistant"]
        ranks = [(place, item) for place, item in answers if item[4] is not None]
        if path is not None and len(ranks) > 1:
            asked = [_turn(group[position][1]) for position in path]
            places = [place for place, _ in ranks]
            yield places[0], Parsed(asked, [item[3] for _, item in ranks], [-item[4] for _, item in ranks], places)


def best_thread(group: Group) -> Made:
    """The conversation that follows the best answer at every turn, up to its last answer."""
    paths = _paths(group)
    yield from _lost(group, paths)
    thread: list[tuple[int, Item]] = []
    following = [one for one in group if one[1][1] is None and paths[one[1][0]]]
    while following:
        thread.append(min(following, key=lambda one: (one[1][4] is None, one[1][4] or 0, one[0])))
        following = [one for one in group if one[1][1] == thread[-1][1][0]]
    if thread and thread[-1][1][2] == "user":
        thread.pop()
    if thread:
        *asked, (place, last) = thread
        yield place, Parsed([_turn(item) for _, item in asked], [last[3]])


def _turn(item: Item) -> Message:
    return {"role": item[2], "content": item[3]}
