"""Fine-tuning on small sets: which samples it takes, what it learns, that it goes on bit for bit, and what it refuses."""

from __future__ import annotations

import csv
import io
import json
import signal
from collections.abc import Iterator
from itertools import count, islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mmclip_shards.manifest import Manifest, load_manifest, save_manifest
from mmclip_shards.reader import ShardReader
from mmclip_shards.writer import write_shard
from PIL import Image
from safetensors.torch import load_file

from mmclip_dist.checkpoint.folder import Meta, checkpoint_path
from mmclip_dist.checkpoint.model_files import write_model
from mmclip_dist.config import FineTune, Optim
from mmclip_dist.data.training import open_training_data
from mmclip_dist.engine.optimizer import build_optimizer, layer_scales
from mmclip_dist.evaluate import tasks
from mmclip_dist.evaluate.encoders import open_encoder
from mmclip_dist.evaluate.finetune import (
    SCORES,
    Cell,
    FineTuning,
    Labelled,
    Validation,
    labelled,
    listed,
    load_recipe,
    parse_seeds,
    parse_shares,
    subset,
)
from mmclip_dist.evaluate.protocol import Columns, load_protocol, names_in
from mmclip_dist.evaluate.reading import LabelledImages
from mmclip_dist.fit import Place
from mmclip_dist.model.build import build_model
from mmclip_dist.model.classifier import Classifier, label_loss
from mmclip_dist.run.metrics import EVALUATIONS, read_metrics
from tests.evaluate import finetune_worker
from tests.ranks import run_ranks

CLASSES = ("Mark", "Rare", "Seldom named")
RECIPE = """
source: quick, for tests
optimizer: adamw
batch: 8
head_deviation: 0.02
drop_path: 0.1
augment: {crop_area: [0.9, 1.0], flip: 0.0}
patience: 3
courses:
  0.1: {lr: 3.0e-3, steps: 8, warmup: 2, every: 4}
  1.0: {lr: 6.0e-3, steps: 40, warmup: 4, every: 20}
"""


def pack(folder: Path, splits: dict[str, int], *, labels: tuple[str, ...] = CLASSES, first: int = 0) -> str:
    """Noise with a bright corner where "Mark" is present; two images a patient. "Rare" is of every 20th patient; "Seldom
    named" is where "Mark" is not, and unknown for most."""
    random, numbers = np.random.default_rng(first), count(first)
    for split, patients in splits.items():
        samples = []
        for patient in islice(numbers, patients):
            marked = bool(random.integers(2))
            for view in range(2):
                pixels = random.integers(0, 90, (32, 32), dtype=np.uint8)
                pixels[4:16, 4:16] += 120 * marked
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "PNG")
                seldom = int(not marked) if patient % 5 == 0 else None
                found = {"Mark": int(marked), "Rare": int(patient % 20 == 7), "Seldom named": seldom}
                document = {"patient": f"{patient:032x}", "labels": {name: found[name] for name in labels}, "report": None}
                samples.append((f"p{patient:04d}-{view}", {"png": buffer.getvalue(), "json": json.dumps(document).encode()}))
        out = str(folder / split)
        shards = tuple(write_shard(out, start // 30, samples[start : start + 30]) for start in range(0, len(samples), 30))
        save_manifest(out, Manifest("base", "marks", split, shards, "test", labels))
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return pack(tmp_path_factory.mktemp("marks"), {"train": 50, "val": 20, "test": 20})


@pytest.fixture(scope="module")
def run(sets, tokenizer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that was trained elsewhere; it tells no patients."""
    folder = tmp_path_factory.mktemp("run")
    checkpoint_path(folder, 3).mkdir(parents=True)
    model = build_model(sets.config(), tokenizer, CLASSES)
    write_model(checkpoint_path(folder, 3), model, tokenizer, sets.config(), Meta(3, 1, 1, CLASSES, ()))
    return str(folder)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("recipe") / "quick.yaml"
    path.write_text(RECIPE)
    return str(path)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield Place(0, 1, torch.device("cpu"))
    dist.destroy_process_group()


def train_samples(data: str) -> Labelled:
    reader = ShardReader(f"{data}/train", load_manifest(f"{data}/train"))
    return labelled(reader, Columns({name: number for number, name in enumerate(CLASSES)}, ()), CLASSES, exclusive=False)


# -- Which samples ----------------------------------------------------------------------------------------------------


def test_subsets_are_nested_patient_safe_and_the_seeds_own(data: str) -> None:
    found = train_samples(data)
    assert len(found.keys) == 100
    for seed in range(3):
        some = [set(subset(found, share, seed).tolist()) for share in (0.01, 0.1, 0.33, 1.0)]
        assert [len(one) for one in some] == [2, 10, 34, 100]
        assert all(one <= other for one, other in pairwise(some))
        for one in some:
            inside = set(found.patients[list(one)])
            assert not inside & set(np.delete(found.patients, list(one)))
    assert set(subset(found, 0.1, 0)) != set(subset(found, 0.1, 1))


def test_a_subset_does_not_depend_on_the_order_of_the_set(data: str) -> None:
    found = train_samples(data)
    shuffled = np.random.default_rng(0).permutation(len(found.keys))
    other = Labelled(*(getattr(found, name)[shuffled] for name in ("shards", "rows", "keys", "patients", "labels")))
    ours, theirs = (set(one.keys[subset(one, 0.2, 5)].tolist()) for one in (found, other))
    assert ours == theirs


def test_a_list_names_keys_or_files_and_its_unknown_lines_are_counted(data: str, tmp_path: Path) -> None:
    found = train_samples(data)
    path = tmp_path / "train_1.txt"
    path.write_text("p0003-0.png 0 0 1\np0004-1\n\np9999-0.png 1 0 0\n")
    samples, unlisted = listed(found, str(path))
    assert found.keys[samples].tolist() == ["p0003-0", "p0004-1"] and unlisted == 1
    path.write_text("nothing.png\n")
    with pytest.raises(ValueError, match=r"train_1.txt lists no key of the training set, whose keys are like 'p0000-0'"):
        listed(found, str(path))
    (tmp_path / "listed.yaml").write_text("source: a list\ntrain_lists: {0.1: train_1.txt}\nclasses: {Mark: {}}\n")
    assert load_protocol(str(tmp_path / "listed.yaml")).train_lists == {0.1: str(path)}


def test_training_reads_the_chosen_samples_and_their_labels_by_class(sets, tokenizer, data: str) -> None:
    found = train_samples(data)
    chosen = subset(found, 0.1, 1)
    config = sets.config(
        "loss={image: 0, entity: 0}", f"data.sources=[{{url: {data}/train}}]", "data.streams=2", "optim.global_batch=10",
        "finetune={checkpoint: a, classes: [Second, First], labels: [Rare, Mark], samples: b}",
    )  # fmt: skip
    with open_training_data(config, tokenizer, 1, found.by_shard(chosen, 4)) as opened:
        batch = next(opened.batches(0, 1, 0))
        assert opened.diseases == ("Second", "First")
    assert sorted(batch["keys"]) == sorted(found.keys[chosen].tolist())  # one epoch
    rows = {key: number for number, key in enumerate(found.keys.tolist())}
    assert batch["labels"].tolist() == [found.labels[rows[key], [1, 0]].tolist() for key in batch["keys"]]
    assert (batch["report_id"] == -1).all()


# -- The model --------------------------------------------------------------------------------------------------------


def options(**more: object) -> FineTune:
    return FineTune(checkpoint="a", classes=CLASSES, labels=CLASSES, samples="b", **more)  # type: ignore[arg-type]


def test_unknown_labels_do_not_count_and_every_known_one_weighs_the_same() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.3, 0.1, -2.0]])
    labels = torch.tensor([[1, 0, -1], [0, -1, -1]])
    each = torch.nn.functional.softplus(torch.tensor([-2.0, -1.0, 0.3]))
    torch.testing.assert_close(label_loss(logits, labels, options()), each.sum() / 3)
    smooth = label_loss(logits, labels, options(smoothing=0.2))
    torch.testing.assert_close(smooth, (each.sum() + 0.1 * (2.0 - -1.0 - 0.3)) / 3)


def test_classes_that_exclude_each_other_have_cross_entropy() -> None:
    logits, labels = torch.randn(3, 3), torch.tensor([[0, 1, 0], [1, 1, 0], [0, 0, 1]])
    chosen = -logits.log_softmax(1)
    torch.testing.assert_close(label_loss(logits, labels, options(exclusive=True)), chosen[0, 1] + chosen[2, 2])


def test_a_classifier_drops_layers_by_the_samples_own_noise_in_training_alone(sets, tokenizer) -> None:
    config = sets.config("model.image={size: 32, patch: 8, width: 32, depth: 3, heads: 2}")
    tuned = config.model_copy(update={"finetune": options(drop_path=0.5, head_norm=True, head_deviation=0.02)})
    model = Classifier(tuned, build_model(config, tokenizer, CLASSES).image)
    batch = {"image": torch.randn(4, 1, 32, 32), "labels": torch.ones(4, 3, dtype=torch.long), "noise": torch.zeros(4, 16)}
    noise = [batch["noise"], torch.full((4, 16), 0.9)]
    kept, dropped = (model.train().forward(batch | {"noise": one})["classification"] for one in noise)  # type: ignore[arg-type]
    assert kept != dropped and kept == model.forward(batch)["classification"]  # type: ignore[arg-type]
    whole = [model.eval().forward(batch | {"noise": one})["classification"] for one in noise]  # type: ignore[arg-type]
    assert whole[0] == whole[1] != kept
    assert model.head.weight.equal(Classifier(tuned, model.image).head.weight)  # by the seed alone
    assert not model.head.weight.equal(Classifier(tuned.model_copy(update={"seed": 1}), model.image).head.weight)


def test_the_encoder_has_its_own_rate_and_sgd_its_momentum(sets, tokenizer) -> None:
    model = build_model(sets.config(), tokenizer, ["Nodule"])
    scales = layer_scales(model, 1.0, 0.1)
    assert {scales[p] for encoder in model.encoders for p in encoder.parameters()} == {0.1}
    assert not [name for name, p in model.named_parameters() if p not in scales and name.startswith(("image.", "text."))]
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = build_optimizer([{"params": [weight]}], Optim(steps=1, name="sgd", betas=(0.5, 0.9)), sharded=False)
    optimizer.param_groups[0]["lr"] = 0.1
    for _ in range(2):
        weight.grad = torch.ones(2)
        optimizer.step()
    torch.testing.assert_close(weight.data, torch.full((2,), 1 - 0.1 - 0.15))


# -- Recipes and words ------------------------------------------------------------------------------------------------


def test_the_recipes_name_their_source_and_have_the_three_shares() -> None:
    assert names_in("recipes") == ["benchx", "maco", "mrm"]
    for name in names_in("recipes"):
        found = load_recipe(name)
        assert set(found.courses) == {0.01, 0.1, 1.0} and "Where ours departs" in found.source
        assert all(course.warmup < course.steps and course.every < course.steps for course in found.courses.values())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--share", "0,1"], "--share 0,1: give different shares of the labels above 0 and up to 1"),
        (["--share", "nan"], "--share nan: give different shares"),
        (["--seeds", "1,1"], "--seeds 1,1: give different whole numbers"),
        (["--recipe", "resnet"], "no recipe 'resnet': the recipes are benchx, maco, mrm; a file must end in .yaml"),
        (["--recipe", "none.yaml"], "--recipe none.yaml: no such file"),
        (["--protocol", "nih"], "no protocol 'nih'"),
    ],
)
def test_odd_words_are_one_line(data: str, monkeypatch, capsys, words: list[str], told: str) -> None:
    monkeypatch.setattr("sys.argv", ["mmclip", "evaluate", "finetune", "RUN", "--data", data, *words])
    from mmclip_dist.cli import app
    from mmclip_dist.cli import run as run_command

    assert run_command(app) == 2
    error = capsys.readouterr().err.strip("\n")
    assert error.startswith("error: ") and told in error and "\n" not in error
    assert parse_shares("0.01,1.0") == (0.01, 1.0) and parse_seeds("3,0") == (3, 0)


def refusal(run: str, place: Place, folder: Path, recipe: str, urls: list[str], protocol: str = "own", **more: object) -> str:
    """What tasks.finetune says to sets that it cannot use."""
    shares = more.pop("shares", [1.0])
    with open_encoder(run) as encoder, pytest.raises(ValueError) as caught:
        request = tasks.Request(encoder, urls, load_protocol(protocol), **more)  # type: ignore[arg-type]
        tasks.finetune(request, load_recipe(recipe), folder, shares, [1], place)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_a_set_lacks_is_one_line(run: str, data: str, recipe: str, place: Place, tmp_path: Path) -> None:
    bare = pack(tmp_path / "bare", {"train": 4, "val": 2, "test": 2}, labels=(), first=500)
    assert "has no labels to evaluate on; pack it with --labels-column" in refusal(run, place, tmp_path / "a", recipe, [bare])
    short = pack(tmp_path / "short", {"train": 4, "test": 4}, first=600)
    assert "has a split 'val'" in refusal(run, place, tmp_path / "a", recipe, [short])
    one = refusal(run, place, tmp_path / "a", recipe, [f"{data}/test"])
    assert "is one split, 'test', and fine-tuning needs 'train' too" in one and "or --train URL" in one
    told = refusal(run, place, tmp_path / "a", recipe, [data], shares=[0.5])
    assert "recipe quick has no values for a share of 0.5 of the labels, only for 0.1, 1: name one of them with --share" in told
    told = refusal(run, place, tmp_path / "a", recipe, [data], train=f"{data}/val")
    assert "the training set and the validation set share 20 patients" in told
    told = refusal(run, place, tmp_path / "a", recipe, [data], validation=f"{data}/test")
    assert "the validation set and the test set share 20 patients" in told
    dull = pack(tmp_path / "dull", {"val": 1}, first=700)
    told = refusal(run, place, tmp_path / "a", recipe, [data], validation=dull)
    assert "no class with both positives and negatives, so no checkpoint can be chosen on it" in told
    fewer = pack(tmp_path / "fewer", {"train": 4}, labels=CLASSES[:2], first=800)
    told = refusal(run, place, tmp_path / "a", recipe, [data], train=fewer)
    assert "lacks labels that the test set has, so they cannot be learned: Seldom named; name another set with --train" in told
    assert not (tmp_path / "a" / "share-1").exists()


def test_a_folder_of_another_fine_tuning_is_refused(run: str, data: str, recipe: str, place: Place, tmp_path: Path) -> None:
    reader, val, test = (ShardReader(f"{data}/{split}", load_manifest(f"{data}/{split}")) for split in ("train", "val", "test"))
    columns = Columns({name: number for number, name in enumerate(CLASSES)}, ())
    with open_encoder(run) as encoder:
        def begin(how: str = recipe, **more: object) -> FineTuning:
            found = load_recipe(how).model_copy(update=more)
            return FineTuning(encoder, load_protocol("own"), CLASSES, found, tmp_path / "ft", place, train=(reader, columns),
                              validation=(val, columns), tests=([test], [columns]))  # type: ignore[arg-type]  # fmt: skip

        begin()
        begin()  # the same goes on
        with pytest.raises(ValueError, match=r"ft holds a fine-tuning with another recipe: name another folder with --folder"):
            begin(smoothing=0.1)
        encoder.sha256 = "0" * 64
        with pytest.raises(ValueError, match=r"with another checkpoint, recipe: "):
            begin("mrm")


def test_a_run_stops_when_no_evaluation_was_better_for_a_while(place: Place, tmp_path: Path) -> None:
    validation = Validation(tmp_path, LabelledImages([], [], ()), every=10, last=95, patience=2)
    for step, value in ((10, 0.6), (20, 0.8), (30, 0.7), (35, None), (40, 0.75)):
        folder = checkpoint_path(tmp_path, step)
        folder.mkdir(parents=True)
        (folder / "meta.json").write_text(json.dumps(vars(Meta(step, 1, 1, (), (), value))))
        assert validation.enough(step) == (step == 40)
    assert validation.best() == (20, 0.8) and validation.due(95) and not validation.due(35)
    assert not validation.missed(40) and not validation.missed(35) and validation.missed(50)
    assert not replace_patience(validation, None).enough(40)


def replace_patience(validation: Validation, patience: int | None) -> Validation:
    return Validation(validation.run_dir, validation.images, validation.every, validation.last, patience)


# -- Whole runs -------------------------------------------------------------------------------------------------------


def command(run: str, data: str, recipe: str, folder: Path, *more: str) -> list[str]:
    return [run, "--data", data, "--recipe", recipe, "--folder", str(folder), "--out", str(folder.with_suffix(".json")), *more]


@pytest.fixture(scope="module")
def whole(run: str, data: str, recipe: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a fine-tuning of two shares and two seeds, and what it printed."""
    folder = tmp_path_factory.mktemp("whole") / "ft"
    words = command(run, data, recipe, folder, "--share", "0.1,1.0", "--seeds", "1,2")
    code, (said,) = run_ranks(finetune_worker.main, words, ranks=1, folder=folder.with_name("logs"))
    assert code == 0, said[-4000:]
    return folder, said


@pytest.mark.slow
def test_a_fine_tuned_model_knows_an_easy_class_of_new_patients(whole: tuple[Path, str], data: str, run: str) -> None:
    folder, said = whole
    found = json.loads(folder.with_suffix(".json").read_text())
    few, all_ = found["results"]
    assert all_["auroc"]["Mark"] > 0.9 < all_["auroc"]["Seldom named"]  # both, of both seeds: a random head has the sign of one
    assert all_["ci95"]["auroc"]["Mark"][0] > 0.8
    assert (found["task"], found["dataset"], found["split_name"]) == ("finetune", "marks", "test")
    assert (found["n"], found["n_patients"]) == (40, 20)
    assert few["n_train"] == [10, 10] and all_["n_train"] == [100, 100] and all_["seeds"] == [1, 2]
    assert np.mean(all_["auroc_macro_of_seeds"]) == pytest.approx(all_["auroc_macro"]) and all_["auroc_macro_sd"] >= 0
    assert all(step % 20 == 0 for step in all_["best_step"]) and all_["f1_val_threshold"]["Mark"] > 0.8
    assert "marks/val" in all_["threshold_from"] and found["recipe"]["courses"]["1.0"]["steps"] == 40
    rows = list(csv.DictReader(folder.with_suffix(".csv").open()))
    assert {(row["seed"], row["n_train"]) for row in rows} == {(s, n) for s in "12" for n in ("10", "100")}
    taken = train_samples(data)
    lacking = [taken.one_kind(CLASSES, subset(taken, 0.1, seed)) for seed in (1, 2)]
    assert few["one_kind_only"] == lacking and lacking[1]["Mark"] == "no positives"
    assert "10%, seed 2: the 10 training images have no positives of Mark: scores of these mean nothing" in found["notes"]
    assert "100%: macro AUROC 0." in said and "macro" in said and "validation: macro AUC" in said and "temperature" not in said


@pytest.mark.slow
def test_finished_cells_are_not_run_again(whole: tuple[Path, str], run: str, data: str, recipe: str, tmp_path: Path) -> None:
    folder, _ = whole
    before = folder.with_suffix(".json").read_text()
    words = command(run, data, recipe, folder, "--share", "0.1,1.0", "--seeds", "1,2")
    code, (said,) = run_ranks(finetune_worker.main, words, True, 1, signal.SIGKILL, ranks=1, folder=tmp_path)
    assert code == 0 and folder.with_suffix(".json").read_text() == before and "images of" not in said, said[-3000:]


@pytest.mark.slow
def test_a_broken_run_ends_in_the_same_bits(whole: tuple[Path, str], run: str, data: str, recipe: str, tmp_path: Path) -> None:
    """Ctrl-C in the step before an evaluation, which it leaves out; then a kill; then to the end."""
    words, logs = command(run, data, recipe, tmp_path / "ft", "--share", "1.0", "--seeds", "1"), tmp_path / "logs"
    code, (said,) = run_ranks(finetune_worker.main, words, True, 19, signal.SIGINT, ranks=1, folder=logs)
    assert code == 130, said[-3000:]
    assert "100% of the labels, seed 1: stopped and saved; run the same command again to go on" in said
    assert checkpoint_path(tmp_path / "ft/share-1/seed-1", 20).is_dir()
    code, _ = run_ranks(finetune_worker.main, words, True, 5, signal.SIGKILL, ranks=1, folder=logs)
    assert code == -signal.SIGKILL
    code, (said,) = run_ranks(finetune_worker.main, words, ranks=1, folder=logs)
    assert code == 0, said[-3000:]
    ours, theirs = (Cell.load(folder / "share-1" / "seed-1" / SCORES) for folder in (tmp_path / "ft", whole[0]))
    assert ours.step == theirs.step and ours.auroc == theirs.auroc
    assert ours.test.scores.tobytes() == theirs.test.scores.tobytes()
    assert ours.validation.scores.tobytes() == theirs.validation.scores.tobytes()
    cells = [folder / "share-1" / "seed-1" for folder in (tmp_path / "ft", whole[0])]
    rows = [read_metrics(cell, EVALUATIONS) for cell in cells]
    assert rows[0] == rows[1] and [row["step"] for row in rows[0]] == [20, 40]  # what was left out was made up for
    mine, its = (load_file(checkpoint_path(cell, ours.step) / "model.safetensors") for cell in cells)
    assert set(mine) == set(its) and all(mine[name].equal(its[name]) for name in its)


@pytest.mark.slow
def test_two_ranks_share_the_work(whole: tuple[Path, str], run: str, data: str, recipe: str, tmp_path: Path) -> None:
    words = command(run, data, recipe, tmp_path / "ft", "--share", "0.1", "--seeds", "1")
    code, (first, second) = run_ranks(finetune_worker.main, words, False, ranks=2, folder=tmp_path / "logs")
    assert code == 0, first[-3000:] + second[-3000:]
    ours, theirs = (Cell.load(folder / "share-0.1" / "seed-1" / SCORES) for folder in (tmp_path / "ft", whole[0]))
    np.testing.assert_allclose(ours.test.scores, theirs.test.scores, atol=1e-4)
    assert "macro" in first and "┃" not in second


@pytest.mark.slow
def test_a_fine_tuned_checkpoint_is_no_whole_model(whole: tuple[Path, str]) -> None:
    with pytest.raises(ValueError, match="holds a fine-tuned classifier, no whole model"), open_encoder(
        str(whole[0] / "share-1" / "seed-1")
    ):
        pass
