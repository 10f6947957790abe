"""The command line: what a user mistypes is one clear line and exit code 2, and nothing is half-written."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from mmclip_launch.commands import app
from mmclip_launch.quickstart import Job, check
from mmclip_shards.document import read_document
from mmclip_shards.manifest import load_manifest
from mmclip_shards.reader import iterate
from mmclip_shards.stats import collect_stats
from PIL import Image
from typer.testing import CliRunner

from mmclip_dist.cli import run
from tests.conftest import wait_for


def call(*arguments: str) -> tuple[int, str]:
    """Exit code and all output of `mmclip ...`, in this process."""
    argv, sys.argv = sys.argv, ["mmclip", *arguments]
    try:
        return run(app), ""
    except SystemExit as stop:
        return int(stop.code or 0), ""
    finally:
        sys.argv = argv


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Six images of three patients, with reports and labels."""
    images = tmp_path / "images"
    images.mkdir()
    rows = []
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (48, 48), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{number}.png")
        rows.append(
            {
                "image": f"{number}.png",
                "patient": f"p{number // 2}",
                "text": f"Report {number}.",
                "labels": "Mass|Edema",
            }
        )
    write(tmp_path / "table.csv", rows)
    return tmp_path / "table.csv"


def write(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def pack(table: Path, *more: str) -> int:
    return call(
        "pack", "csv", "--table", str(table), "--images", str(table.parent / "images"), "--image-column", "image",
        "--patient-column", "patient", "--text-column", "text", "--labels-column", "labels",
        "--splits", "train=.5,test=.5", str(table.parent / "set"), *more,
    )[0]  # fmt: skip


def test_help_begins_with_what_most_begin_with(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (("-h",), ("pack", "csv", "-h"), ("launch", "slurm", "-h"), ("evaluate", "probe", "-h")):
        assert call(*words)[0] == 0
    assert call("--help")[0] == 0
    out = capsys.readouterr().out
    names = ("pack", "view", "tokenizer", "entities", "quickstart", "launch", "evaluate", "demo")
    places = [out.rindex(f"│ {name} ") for name in names]
    assert places == sorted(places) and "│ train " not in out
    assert call("train", "quickstart", "optim.lr=1", "--nodes", "2")[0] == 2
    assert "`mmclip launch deepspeed quickstart optim.lr=1 --nodes 2`" in capsys.readouterr().err


def test_every_default_is_one_that_its_option_takes(capsys: pytest.CaptureFixture[str]) -> None:
    """Typer gives the defaults to the options' own parsers."""
    assert call("quickstart", "--paired", "nowhere")[0] == 2
    assert "name at least one --paired and one --eval" in capsys.readouterr().err


def test_a_folder_of_splits_where_a_split_is_needed(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pack(table) == 0
    for words in (("labels", f"{table.parent}/set"), ("entities", f"{table.parent}/set")):
        assert call(*words)[0] == 2
        assert f"{table.parent}/set is the folder of several splits: name one of test, train below it" in capsys.readouterr().err


def test_ctrl_c_is_one_line_and_code_130(tmp_path: Path) -> None:
    """It reaches all processes of the terminal."""
    command = [sys.executable, "-m", "mmclip_launch.cli", "pack", "synthetic", str(tmp_path / "set"), "--count", "1000",
               "--workers", "2", "--samples-per-shard", "8"]  # fmt: skip
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        wait_for(lambda: any(tmp_path.glob("set/*/*.tar")), timeout=240)
        os.killpg(running.pid, signal.SIGINT)
        _, told = running.communicate(timeout=60)
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
    assert running.returncode == 130, told
    assert [line for line in told.splitlines() if line.strip()] == ["stopped; run the same command again to go on"]


@pytest.mark.parametrize("late", [False, True])
def test_ctrl_c_before_a_command_begins_says_nothing(late: bool, tmp_path: Path) -> None:
    """It comes while modules are imported (of which this test puts one before the real one), or in the last moment before."""
    struck = "import os, signal; os.kill(os.getpid(), signal.SIGINT); print('goes on')"
    if late:
        code = f"import mmclip_launch.commands, typer.main as m\nm.get_command = lambda _: exec({struck!r})\n"
        words = ["-c", f"{code}from mmclip_launch.cli import main; import sys; sys.exit(main())"]
    else:
        (tmp_path / "typer.py").write_text(struck)
        words = ["-m", "mmclip_launch.cli", "--version"]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    found = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    assert (found.returncode, found.stdout, found.stderr) == (130, "", "")


def test_pack_writes_splits_by_patient(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pack(table) == 0
    train, test = (load_manifest(str(table.parent / "set" / split)) for split in ("train", "test"))
    assert train.samples + test.samples == 12 and train.samples % 2 == 0
    assert f"{train.samples} samples in 1 shards" in capsys.readouterr().out
    assert pack(table) == 0  # again: nothing to do


def test_equal_numbers_are_one_patient_of_your_own_sets_and_several_of_published_ones(tmp_path: Path) -> None:
    """Many a collection has a patient 1."""
    raw = tmp_path / "raw"
    (raw / "images").mkdir(parents=True)
    Image.fromarray(np.eye(48, dtype=np.uint8) * 255).save(raw / "images" / "a.png")
    (raw / "records.jsonl").write_text('{"image": "images/a.png", "patient": "1", "report": "Clear."}\n')
    (raw / "Data_Entry_2017.csv").write_text("Image Index,Finding Labels,Patient ID,View Position\na.png,No Finding,1,PA\n")
    table = "--table", str(raw / "Data_Entry_2017.csv"), "--images", str(raw / "images"), "--image-column", "Image Index"

    def patient(*words: str) -> str | None:
        dest = tmp_path / f"set-{len(list(tmp_path.iterdir()))}"
        assert call("pack", *words, str(dest), "--splits", "all=1")[0] == 0
        (sample,) = iterate(dest / "all")
        return read_document(sample[1]).patient

    own, published = patient("jsonl", str(raw)), patient("nih", str(raw))
    assert own is not None and own == patient("csv", *table, "--patient-column", "Patient ID")
    assert published != own and published == patient("csv", *table, "--patient-column", "Patient ID", "--patients-of", "nih")


def test_how_images_are_made_is_an_option(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option, value, message in (
        ("--format", "gif", "format 'gif' is unknown"), ("--window", "1", "--window is '1'; two percentiles such as 1,99"),
        ("--window", "9,1", "two rising percentiles"), ("--quality", "101", "quality is 101"),
    ):  # fmt: skip
        assert pack(table, option, value) == 2
        assert message in capsys.readouterr().err
    assert not (table.parent / "set").exists()
    assert pack(table, "--format", "webp-lossless", "--window", "1,99", "--clahe", "--short-side", "32") == 0
    made = {"short_side": 32, "format": "webp-lossless", "quality": 95, "window": [1, 99], "clahe": True}
    assert load_manifest(str(table.parent / "set" / "train")).images == made
    assert pack(table) == 2
    assert "other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[3].update(image="gone.png"), "gone.png|row 5"),
        (lambda rows: rows[3].update(text=" "), "empty-reports"),
        (lambda rows: rows[3].update(image=rows[2]["image"]), "records 3 and 4 share the key.*--max-bad-fraction 0.084"),
        (lambda rows: rows[3].update(patient=""), "row 5"),
        (lambda rows: [row.update(wording=row.pop("text")) for row in rows], "text.*columns|columns.*wording"),
    ],
)
def test_bad_tables_are_one_line_and_leave_nothing(
    table: Path, capsys: pytest.CaptureFixture[str], change, message: str
) -> None:
    rows = read(table)
    change(rows)
    write(table, rows)
    assert pack(table) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and re.search(message, error[0]), error
    assert not (table.parent / "set").exists()


def test_a_table_is_looked_at_and_its_terms_are_stored(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pack(table, "--check") == 0
    out = capsys.readouterr().out
    assert "looked at 12 records of 6 patients, and at 12 images" in out and "present labels: Edema 12, Mass 12" in out
    assert f"contact sheet: {table.parent}/set-check.png" in out and not (table.parent / "set").exists()
    assert Image.open(table.parent / "set-check.png").size[0] > 100
    assert pack(table, "--licence", "CC BY 4.0", "--access", "ask the hospital") == 0
    manifest = load_manifest(str(table.parent / "set" / "train"))
    assert (manifest.licence, manifest.access) == ("CC BY 4.0", "ask the hospital")


def test_bad_images_stop_a_pack_unless_their_share_is_allowed(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (table.parent / "images" / "7.png").write_bytes(b"no image")
    (table.parent / "images" / "8.png").write_bytes(b"")
    assert pack(table) == 2
    error = capsys.readouterr().err
    assert "error: 2 of 12 images cannot be used: " in error and "--max-bad-fraction 0.167" in error
    assert not list(table.parent.glob("set/*/manifest.json"))
    for _ in range(2):  # the second time, nothing is left to do
        assert pack(table, "--max-bad-fraction", "0.167") == 0
        told = capsys.readouterr().out
        assert sum(int(count) for count in re.findall(r"(\d+) samples in 1 shards", told)) == 10
        assert sum(int(count) for count in re.findall(r"; (\d+) left out, see \S+/quarantine.jsonl", told)) == 2


def test_a_patient_in_two_splits_is_refused(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = read(table)
    for number, row in enumerate(rows):
        row["split"] = "train" if number % 2 else "test"
    write(table, rows)
    assert pack(table, "--split-column", "split") == 2
    assert "p0" not in capsys.readouterr().err.split("error:")[1]  # no raw id in a message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["config", "quickstart", "optim.step=3"], "did you mean optim.steps"),
        (["config", "nothing"], "the recipes are"),
        (["evaluate", "zeroshot", "/nowhere", "--checkpoint", "/nowhere"], "/nowhere"),
        (["entities", "/nowhere"], "/nowhere"),
        (["report", "/nowhere"], "/nowhere"),
        (["tokenizer", "/nowhere", "--out", "/tmp/never"], "/nowhere"),
        (["quickstart", "--paired", "/nowhere", "--eval", "/nowhere", "--out", "/tmp/never"], "/nowhere"),
        (["quickstart", "--eval", "/nowhere", "--out", "/tmp/never"], "at least one --paired"),
        (["quickstart", "--out", "/tmp/never", "optim.stepz=1"], "did you mean optim.steps"),
        (["quickstart", "--out", "/tmp/never", "data.streams=31"], "no multiple of data.streams=31"),
        (["verify", "/nowhere"], "no manifest.json in /nowhere"),
        (["verify", "nostore://x"], "nostore"),
        (["stats", "/nowhere"], "no manifest.json in /nowhere"),
        (["index", "/nowhere"], "no *.tar in /nowhere"),
        (["reshard", "/nowhere", "/tmp/never", "--samples-per-shard", "9"], "no manifest.json in /nowhere"),
        (["merge", "/nowhere", "/tmp/never"], "merge takes two sets or more"),
        (["split", "/nowhere", "/tmp/never"], "must be above 0, and at most 1"),
        (["split", "/nowhere", "/tmp/never", "--val", "0.6", "--test", "0.6"], "must be above 0, and at most 1"),
        (["filter", "/nowhere", "/tmp/never", "view == 'PA'"], "no manifest.json in /nowhere"),
        (["duplicates", "/nowhere"], "no manifest.json in /nowhere"),
        (["duplicates", "/nowhere", "--kinds", "image"], "'image' is no kind of duplicates; the kinds are images, reports"),
        (["plan", "mmclip_vit_b16", "--gpu", "v100"], "the known ones are a100-40"),
        (["plan", "mmclip_vit_b16", "--gpus", "12"], "do not fill nodes of 8"),
    ],
)
def test_faults_are_one_line_and_code_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*arguments)[0] == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not Path("/tmp/never").exists()


def test_verify_is_0_for_a_whole_set_and_1_with_a_line_for_each_finding(
    table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pack(table) == 0
    capsys.readouterr()
    folder = table.parent / "set"
    assert call("verify", str(folder), "--workers", "2")[0] == 0
    assert "no findings; 12 samples" in capsys.readouterr().out
    shard = folder / "test" / "000000.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    assert call("verify", str(folder))[0] == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(line.startswith(f"{shard}: ") for line in lines[:2]) and "2 findings" in lines[2]


def test_stats_says_where_patients_are(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pack(table) == 0
    folder = table.parent / "set"
    capsys.readouterr()
    assert call("stats", str(folder))[0] == 0
    assert "no patient is in more than one split" in capsys.readouterr().out
    assert call("stats", str(folder), "--json")[0] == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(split["samples"] for split in found["splits"]) == 12 and found["patients_in_several_splits"] == 0
    shutil.copytree(folder / "test", folder / "again")
    assert call("stats", str(folder))[0] == 0
    assert "WRONG: " in capsys.readouterr().out


def test_index_takes_shards_of_others(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = table.parent / "theirs"
    folder.mkdir()
    with tarfile.open(folder / "shard.0.tar", "w") as tar:
        for number in range(3):
            tar.add(table.parent / "images" / f"{number}.png", f"{number}.png")
            tar.add(table, f"{number}.cls")
    assert call("index", str(folder), "--dataset", "other", "--split", "val")[0] == 0
    out = capsys.readouterr().out
    assert "3 samples in 1 shards" in out and "left out: 3 members .cls" in out
    manifest = load_manifest(str(folder))
    assert (manifest.dataset, manifest.split) == ("other", "val")
    assert call("verify", str(folder))[0] == 0
    assert call("index", str(folder))[0] == 2
    assert "has a manifest.json already" in capsys.readouterr().err


def test_sets_are_made_of_sets(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pack(table) == 0
    folder, made = str(table.parent / "set"), table.parent / "made"
    assert call("reshard", folder, str(made / "r"), "--samples-per-shard", "2")[0] == 0
    capsys.readouterr()
    assert call("split", str(made / "r"), str(made / "s"), "--val", "0.3", "--seed", "3")[0] == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 2 and re.fullmatch(rf"{made}/s/train: \d+ samples in 1 shards; licence: not stated", out[0])
    assert call("filter", str(made / "s"), str(made / "f"), 'labels["Edema"] == 1', "--dry-run")[0] == 0
    assert [line.split(": ")[0] for line in capsys.readouterr().out.splitlines()] == ["train", "val"]
    assert not (made / "f").exists()
    assert call("filter", str(made / "s"), str(made / "f"), 'labels["Oedema"] == 1')[0] == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error and "there is no label 'Oedema'; nearest: 'Edema'" in error
    assert call("filter", str(made / "s"), str(made / "f"), 'labels["Edema"] == 1')[0] == 0
    assert call("merge", str(made / "f" / "train"), str(made / "s" / "val"), str(made / "m"), "--dataset", "all")[0] == 0
    assert call("verify", str(made / "m"))[0] == 0
    capsys.readouterr()
    assert call("duplicates", folder, str(made / "s"), "--list", str(made / "list.jsonl"))[0] == 0
    out = capsys.readouterr().out
    assert "24 samples of 4 sets; 0 cannot be decoded" in out and "24 samples in 12 groups" in out
    assert (made / "list.jsonl").exists() and "samples that could go" in out


def test_wrong_options_are_code_2() -> None:
    assert CliRunner().invoke(app, ["pack", "csv", "--tabel", "x"]).exit_code == 2
    assert CliRunner().invoke(app, ["quickstart", "--help"]).exit_code == 0


def test_config_prints_what_it_would_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert call("config", "quickstart", "optim.steps=777")[0] == 0
    (tmp_path / "saved.yaml").write_text(capsys.readouterr().out)
    assert call("config", str(tmp_path / "saved.yaml"))[0] == 0
    assert "steps: 777" in capsys.readouterr().out


def test_an_evaluation_set_that_is_trained_on_is_refused_at_once(sets, tmp_path: Path) -> None:
    job = Job(tmp_path / "out", (sets.paired,), (), (sets.paired,), ("data.streams=4", "optim.global_batch=8"))
    with pytest.raises(ValueError, match="is trained on"):
        check(job)


def test_too_few_samples_are_said_at_once(sets, tmp_path: Path) -> None:
    job = Job(tmp_path / "out", (sets.paired,), (), (sets.test,), ("data.streams=128", "optim.global_batch=128"))
    with pytest.raises(ValueError, match="cannot fill"):
        check(job)


@pytest.mark.slow
def test_training_without_launcher_says_how_to_start_it() -> None:
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK")}
    found = subprocess.run(
        [sys.executable, "-m", "mmclip_dist.train", "quickstart", "data.sources=[{url: a}]", "loss.entity=0",
         "model.text.tokenizer=t"],
        capture_output=True, text=True, env=env, timeout=120,
    )  # fmt: skip
    assert found.returncode == 2 and "deepspeed --module mmclip_dist.train" in found.stderr
    assert "Traceback" not in found.stderr


def test_packing_the_real_tables(real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(
        "pack", "csv", "--table", str(real_data / "covid_cxr/pairs.csv"), "--images", str(real_data / "covid_cxr"),
        "--image-column", "image", "--text-column", "clinical_notes", "--patient-column", "patientid", "--age-column", "age",
        str(tmp_path / "covid"),
    )[0] == 0  # fmt: skip
    assert call(
        "pack", "csv", "--table", str(real_data / "nih_cxr1000/labels.csv"), "--images", str(real_data / "nih_cxr1000"),
        "--image-column", "image", "--labels-column", "finding_labels", "--labels-separator", "|",
        "--patient-column", "patient_id", str(tmp_path / "nih"),
    )[0] == 0  # fmt: skip
    total = {
        name: [load_manifest(str(tmp_path / name / split)) for split in ("train", "val", "test")]
        for name in ("covid", "nih")
    }
    assert sum(m.samples for m in total["covid"]) == 296 and sum(m.samples for m in total["nih"]) == 1000
    assert call("stats", str(tmp_path / "covid"), "--html", str(tmp_path / "card.html"))[0] == 0
    ages = collect_stats(str(tmp_path / "covid")).splits
    assert sum(split.samples - split.without_age for split in ages) == 281 and all(split.ages for split in ages)
    assert "holds no ages" not in (tmp_path / "card.html").read_text()
    assert len(total["nih"][0].labels) == 14 and total["covid"][0].labels == ()
