"""Protocols: their files, their prompts against what the sources say, and how a set's labels are matched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from mmclip_shards.manifest import load_manifest
from mmclip_shards.reader import ShardReader

from mmclip_dist.data.prompts import load_prompts
from mmclip_dist.evaluate.protocol import (
    Texts,
    check_prompts,
    check_split,
    columns_of,
    load_protocol,
    matched,
    own_prompts,
    prompts_hash,
    protocol_names,
)

WITHOUT_PROMPTS = {"nih14@mrm", "rsna@benchx", "siim@benchx"}


def test_every_protocol_names_its_source_and_says_what_it_asks() -> None:
    names = protocol_names()
    assert {"own", "nih14@official", "chexpert5@chexzero", "rsna@mavl", "padchest14@mavl", "vindr18@cxrclip"} < set(names)
    for name in names:
        protocol = load_protocol(name)
        assert protocol.name == name and len(protocol.source) > 20
        if name in WITHOUT_PROMPTS:
            with pytest.raises(ValueError, match=r"has no prompts, so it cannot be scored zero-shot: evaluate a probe"):
                protocol.prompts()
        elif name != "own":
            prompts = protocol.prompts()
            assert list(prompts) == list(protocol.classes)
            assert not [text for texts in prompts.values() for text in (*texts.present, *texts.absent) if "{" in text]


def test_prompts_are_those_of_the_sources() -> None:
    official = load_protocol("nih14@official").prompts()
    assert len(official) == 14 and official["Effusion"] == Texts(("Effusion",), ("no Effusion",))
    assert official["Pleural_Thickening"].absent == ("no Pleural Thickening",)
    assert load_protocol("vindr18@cxrclip").prompts()["Nodule/Mass"] == Texts(("Nodule/Mass",), ("No Nodule/Mass",))
    assert load_protocol("openi18@carzero").prompts()["Infiltration"] == Texts(("There is infiltrate",), ())
    vindr = load_protocol("vindr28@cxc").prompts()
    assert len(vindr) == 28 and vindr["No finding"] == Texts(("No finding",), ("there is Finding",))
    assert vindr["COPD"] == Texts(("COPD",), ("no COPD",)) and load_protocol("vindr28@cxc").classes["Other disease"].labels
    padchest = load_protocol("padchest193@kad").prompts()
    assert len(padchest) == 193 and padchest["NSG tube"] == Texts(("NSG tube",), ())
    maco = load_protocol("rsna@maco").prompts()["Pneumonia"]
    assert maco.present == ("There is pneumonia. ",) and maco.absent[0] == "the lung is clear." and len(maco.absent) == 4
    counts = {name: len(texts.present) for name, texts in load_protocol("chexpert5x200@gloria").prompts().items()}
    assert counts == {"Atelectasis": 210, "Cardiomegaly": 15, "Consolidation": 192, "Edema": 18, "Pleural Effusion": 54}
    gloria = load_protocol("chexpert5x200@gloria").prompts()
    assert "mild linear atelectasis at the lung bases" in gloria["Atelectasis"].present
    assert "small left subpulmonic pleural effusion" in gloria["Pleural Effusion"].present


def test_the_own_prompts_are_those_of_training() -> None:
    texts = load_prompts(("Mass", "Edema")).texts
    prompts = own_prompts(("Mass", "Edema"), None)
    assert prompts["Edema"] == Texts(tuple(row[1] for row in texts), tuple(row[3] for row in texts))
    assert prompts_hash(prompts) == prompts_hash(dict(prompts)) != prompts_hash(own_prompts(("Mass",), None))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("classes: {A: {}}", "source: Field required"),
        ("source: x\nclases: {A: {}}", "unknown config key 'clases'"),
        ("source: x\nmetrics: [auc]", "metrics.0"),
        ("source: [", "is not valid YAML"),
        ("just words", "must hold the fields of a protocol"),
    ],
)
def test_a_file_that_is_no_protocol_is_one_line(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ValueError, match=told) as error:
        load_protocol(str(tmp_path / "p.yaml"))
    assert "\n" not in str(error.value)


def test_an_unknown_protocol_lists_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no protocol 'nih@offical': the protocols are chexpert5@chexzero, .*vindr18@cxrclip"):
        load_protocol("nih@offical")
    with pytest.raises(ValueError, match="no such file"):
        load_protocol(str(tmp_path / "gone.yaml"))


def test_a_class_without_prompts_and_a_long_prompt_are_named(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("source: mine\nclasses: {Edema: {present: ['There is {disease}.']}, Mass: {}}\n")
    with pytest.raises(ValueError, match="protocol p: the class 'Mass' has no prompts"):
        load_protocol(str(tmp_path / "p.yaml")).prompts()
    with pytest.raises(ValueError, match=r"a prompt of 'Edema' has 3 tokens, but the model reads 2: 'There is edema\.'"):
        check_prompts({"Edema": Texts(("There is edema.",), ())}, lambda text: len(text.split()), 2)


def test_labels_are_matched_by_name(sets) -> None:
    manifest = replace(load_manifest(sets.test), labels=("pleural thickening", "Atelectasis", "Infiltrate", "Odd"))
    protocol = load_protocol("nih14@official")
    subset = protocol.model_copy(
        update={"classes": {name: protocol.classes[name] for name in ("Atelectasis", "Infiltration", "Pleural_Thickening")}}
    )
    found = columns_of(subset, manifest, "set")
    assert found.labels == {"Atelectasis": 0, "Infiltrate": 1, "pleural thickening": 2} and found.unknown == ("Odd",)
    assert found.of_box("Pleural_Thickening") == 2 and found.of_box("Odd") is None
    with pytest.raises(ValueError, match=r"set lacks labels that .* needs: Cardiomegaly, .*unknown to the protocol: Odd"):
        columns_of(protocol, manifest, "set")


def test_another_split_and_a_set_without_labels_are_refused(sets) -> None:
    manifest = load_manifest(sets.paired)
    with pytest.raises(ValueError, match="is the split 'train', but protocol siim@cxrclip is defined on 'test'"):
        check_split(load_protocol("siim@cxrclip"), manifest, sets.paired)
    check_split(load_protocol("own"), manifest, sets.paired)
    with pytest.raises(ValueError, match="has no labels to evaluate on; pack it with --labels-column"):
        matched(load_protocol("own"), [ShardReader(sets.paired, replace(manifest, labels=()))])


def test_the_own_classes_are_the_labels_of_all_sets(sets) -> None:
    manifest = load_manifest(sets.test)
    one, other = (ShardReader(sets.test, replace(manifest, labels=names)) for names in (("A_B", "C"), ("C", "a b")))
    classes, (first, second) = matched(load_protocol("own"), [one, other])
    assert classes == ("A_B", "C", "a b")  # not folded: a set's labels are its own business
    assert first.labels == {"A_B": 0, "C": 1} and second.labels == {"C": 1, "a b": 2}
