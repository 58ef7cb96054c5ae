"""The steps from plain values to validated settings: merge, locate paths, validate; problems are gathered,
not raised."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from align.errors import Problem
from align.recipe.data_settings import DATA_PLACES, ReadSettings
from align.recipe.messages import explain
from align.recipe.nearest import did_you_mean, nearest
from align.recipe.overrides import Origins, assign
from align.recipe.paths import locate, model_reason
from align.recipe.recipe_settings import RecipeSettings
from align.recipe.schema import KeyPath, complete, fixed, model_at, places
from align.recipe.settings import Settings, is_marked
from align.recipe.trainer_args import check_trainer_args
from align.recipe.training_settings import ModelSettings

if TYPE_CHECKING:  # the pipeline stands above the recipe: its types are known here, its code is not
    from align.recipe.spec import StageSpec

OWN = tuple(RecipeSettings.model_fields)
"""Top-level keys that are the recipe's own; every other one is a stage."""

_STAGE_NAME = re.compile(r"[A-Za-z0-9][\w-]*")
_SettingsT = TypeVar("_SettingsT", bound=Settings)


@dataclass(frozen=True)
class StageRecipe:
    """One stage of a recipe: its kind, the contract of the kind, and the validated settings."""

    kind: str
    spec: StageSpec
    config: Settings


@dataclass
class Reading:
    """One recipe being read. `values` is the file's content; `problems` grows with every step."""

    values: dict[str, Any]
    origins: Origins
    specs: Mapping[str, StageSpec]
    directory: Path
    problems: list[Problem]
    data: dict[str, Any] = field(default_factory=dict)
    """The recipe's own `data`, its paths made absolute."""
    with_data: set[str] = field(default_factory=set)
    """Stages that name their own files."""

    def settings(self) -> RecipeSettings | None:
        """The recipe's own settings; None when they are wrong."""
        given = {key: value for key, value in self.values.items() if key in OWN}
        merged = self._merged(RecipeSettings, given, ())
        self._locate(RecipeSettings, merged, (), [])
        self.data = merged["data"] if isinstance(merged.get("data"), dict) else {}
        return self._validated(RecipeSettings, merged, ())

    def stages(self) -> dict[str, StageRecipe]:
        """Every valid stage by name: those of the file, then requested ones, then those only overridden."""
        in_file = [name for name in self.values if name not in OWN]
        overridden = [override.path[0] for override in self.origins.overrides if override.path[0] not in OWN]
        names = list(dict.fromkeys([*in_file, *self.origins.requested, *overridden]))
        stages = {}
        for name in names:
            kind = self._kind(name)
            config = self._stage(name, self.specs[kind], names) if kind else None
            if kind and config:
                stages[name] = StageRecipe(kind, self.specs[kind], config)
        return stages

    def check_data_option(self, stages: Mapping[str, StageRecipe]) -> None:
        """--data has no effect, and so is an error, when every requested stage names its own data."""
        option = next((item for item in self.origins.overrides if item.text.startswith("--data ")), None)
        readers = [name for name in self.origins.requested if name in stages and stages[name].spec.data]
        if option and readers and self.with_data.issuperset(readers):
            where = self.origins.where((readers[0], "data"))
            what = f"has no effect: `{readers[0]}` names its own data ({where})"
            self.problems.append(Problem(option.where, what, f"set `{readers[0]}.data={option.value}` instead"))

    def _stage(self, name: str, spec: StageSpec, names: list[str]) -> Settings | None:
        given = self.values.get(name)
        merged = self._merged(spec.config, {} if given is None else given, (name,))
        self._locate(spec.config, merged, (name,), names)
        data = merged.get("data") if isinstance(merged, dict) else None
        if isinstance(data, dict) and not data.keys() & {"path", "mixture"}:
            merged["data"] = {**self.data, **data}
        elif data:
            self.with_data.add(name)
        arguments = merged.get("trainer_args") if isinstance(merged, dict) else None
        if spec.trainer_config and isinstance(arguments, dict):
            path = (name, "trainer_args")
            self.problems += check_trainer_args(arguments, spec.trainer_config, path, self.origins)
        return self._validated(spec.config, merged, (name,))

    def _merged(self, model: type[Settings], given: Any, prefix: KeyPath) -> Any:
        """What was given, with overrides in place, over the defaults that depend on the stage."""
        values = complete(model, given)
        for override in self.origins.overrides:
            if override.path[: len(prefix)] != prefix or (not prefix and override.path[0] not in OWN):
                continue
            if override.path == prefix:
                values = {} if override.value is None else override.value
            else:
                values = values if isinstance(values, dict) else {}
                assign(values, override, len(prefix))
            values = complete(model, values)  # an override may bring a shorthand, or replace one
        return values

    def _validated(self, model: type[_SettingsT], values: Any, prefix: KeyPath) -> _SettingsT | None:
        try:
            # JSON mode is strict about types ("5" is not 5) and still takes a list for a tuple.
            return model.model_validate_json(json.dumps(values), strict=True)
        except ValidationError as error:
            self.problems += explain(error, model, values, prefix, self.origins)
            return None

    def _locate(self, model: type[Settings], values: Any, prefix: KeyPath, stages: list[str]) -> None:
        """Makes the local paths inside `values` absolute, in place. A source may also be one of the stages."""
        for settings, found, path in places(model, values, prefix):
            if issubclass(settings, ReadSettings):
                for key in found.keys() & DATA_PLACES:
                    found[key] = self._located(found[key], (*path, key))
            elif issubclass(settings, ModelSettings):
                if isinstance(found.get("path"), str):
                    found["path"] = self._model(found["path"], (*path, "path"), [])
            else:
                for key, field in settings.model_fields.items():
                    if key in found and is_marked(field, "source"):
                        found[key] = self._source(found[key], (*path, key), stages)
                    elif key in found and is_marked(field, "file") and isinstance(found[key], str):
                        found[key] = str(self._base((*path, key)) / Path(found[key]).expanduser())

    def _located(self, value: Any, path: KeyPath) -> Any:
        base = self._base(path)
        if isinstance(value, list):
            return [locate(item, base) if isinstance(item, str) else item for item in value]
        return locate(value, base) if isinstance(value, str) else value

    def _base(self, path: KeyPath) -> Path:
        """What a relative path at this key starts from."""
        return Path.cwd() if self.origins.from_command_line(path) else self.directory

    def _source(self, value: Any, path: KeyPath, stages: list[str]) -> Any:
        """A source, or a list of them: stages as they are, anything else as a model."""
        if isinstance(value, list):
            return [self._source(item, (*path, place), stages) for place, item in enumerate(value)]
        is_model = isinstance(value, str) and value not in stages
        return self._model(value, path, stages) if is_model else value

    def _model(self, text: str, path: KeyPath, names: list[str]) -> str:
        """A model's path, made absolute if local; `names` are stages that could have been meant."""
        located = str(self._located(text, path))
        reason = model_reason(located)
        if reason:
            what, hint = reason
            near = nearest(text, names)
            self._say(path, what, f"did you mean the stage `{near}`?" if near else hint)
        return located

    def _kind(self, name: str) -> str | None:
        """The kind of a stage: what `kind` inside it says, else its name."""
        if not _STAGE_NAME.fullmatch(name) and "." not in name:
            self._say((name,), "a stage's name is a folder's name", "use letters, digits, - and _")
            return None
        said = [value["kind"] for value in self._sections(name) if "kind" in value]
        if not said and name in self.specs:
            return name
        if not said:
            self._say((name,), *self._unknown(name))
        elif said[-1] not in list(self.specs):
            hint = did_you_mean(str(said[-1]), self.specs)
            self._say((name, "kind"), f"'{said[-1]}' is not a kind of stage", hint)
        elif name in self.specs and said[-1] != name:
            what = f"a stage named `{name}` is of kind {name}, not {said[-1]}"
            self._say((name, "kind"), what, "give it another name")
        else:
            return said[-1]
        return None

    def _sections(self, name: str) -> Iterator[dict[str, Any]]:
        """What the file and the overrides say about a stage, in order, as far as it can hold `kind`."""
        if isinstance(self.values.get(name), dict):
            yield self.values[name]
        for override in self.origins.overrides:
            if override.path == (name,) and isinstance(override.value, dict):
                yield override.value
            elif override.path[0] == name and len(override.path) > 1:
                yield {override.path[1]: override.value} if len(override.path) == 2 else {}

    def _unknown(self, name: str) -> tuple[str, str]:
        """What to say of a top-level key that is not a setting and does not say which kind of stage it is."""
        what = "neither a setting of the recipe nor a kind of stage"
        holds_settings = any(True for _ in self._sections(name))
        own = [key for key in OWN if not holds_settings or model_at(RecipeSettings, (key,))]
        near = nearest(name, [*own, *self.specs])
        if near:
            return what, f"did you mean `{near}`?"
        if name.endswith((".yaml", ".yml")):
            return what, f"a recipe is named with -c: `-c {name}`"
        if "." in name:
            return what, f"nest it: `{name.split('.')[0]}:` with `{name.split('.', 1)[1]}` inside"
        for kind, spec in self.specs.items():
            if any(setting.key.rsplit(".", 1)[-1] == name for setting in fixed(spec.config)):
                return what, f"did you mean `{name}` inside `{kind}:`?"
        return what, f"a stage of your own name needs `kind:` inside, one of {', '.join(self.specs)}"

    def _say(self, path: KeyPath, what: str, hint: str = "") -> None:
        self.problems.append(self.origins.problem(path, what, hint))
