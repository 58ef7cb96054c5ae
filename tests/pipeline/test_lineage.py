"""`align lineage`: the ancestry, and whether every file is intact."""

from __future__ import annotations

import json
import shutil

from toy_run import Toy


def test_the_ancestry_of_a_result_of_its_model_and_of_a_run(toy: Toy) -> None:
    toy.align("run", "ppo")
    ppo = toy.directory("ppo")
    shown = toy.align("lineage", str(ppo))
    for text in ("policy: sft", "reference: sft", "reward: reward", "policy: base", "2 files verified"):
        assert text in shown
    assert toy.align("lineage", str(ppo / "model")) == shown
    assert toy.align("lineage", str(toy.run_dir)) == shown

    (tree,) = json.loads(toy.align("lineage", str(ppo), "--json"))
    assert tree["source"] == "ppo"
    assert tree["verified"]
    assert [parent["slot"] for parent in tree["inputs"]] == ["policy", "reference", "reward"]
    assert tree["inputs"][2]["inputs"][0]["inputs"][0]["source"] == "base"

    moved = toy.folder / "moved"
    shutil.move(toy.run_dir, moved)
    assert toy.align("lineage", str(moved)) == shown


def test_damage_anywhere_in_the_ancestry_is_told(toy: Toy) -> None:
    toy.align("run", "sft")
    weights = toy.directory("base") / "model" / "model.safetensors"
    weights.write_text("0" * weights.stat().st_size)
    shown = toy.align("lineage", str(toy.directory("sft")), code=4)
    assert "DAMAGED" in shown
    assert "content differs from the manifest" in shown


def test_a_manifest_that_does_not_belong_to_the_record_is_told(toy: Toy) -> None:
    toy.align("run", "sft")
    model = toy.directory("base") / "model"
    shutil.rmtree(model)
    shutil.copytree(toy.directory("sft") / "model", model)
    assert "MANIFEST.json differs from record.json" in toy.align("lineage", str(toy.run_dir), code=4)


def test_a_folder_without_results_is_refused(toy: Toy) -> None:
    assert "no finished stage here" in toy.align("lineage", str(toy.folder), code=4)
    assert "no finished stage here" in toy.align("lineage", "nowhere", code=4)
