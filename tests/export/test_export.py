"""Exports: other programs give the numbers of the model, and what cannot be exported is refused in one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from mmclip_shards import decode_image, grey, load_manifest
from mmclip_shards.grey import grey_image
from mmclip_shards.manifest import save_manifest
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, SiglipVisionModel

from mmclip_dist import MMCLIPModel, crop_image
from mmclip_dist.checkpoint.folder import AVERAGED_WEIGHTS, CONFIG, META, WEIGHTS, Meta, checkpoint_path, weights_hash
from mmclip_dist.checkpoint.model_files import load_model, write_model
from mmclip_dist.cli import app
from mmclip_dist.cli import run as run_command
from mmclip_dist.config import dump_config
from mmclip_dist.data.transforms import WHOLE
from mmclip_dist.evaluate.encoders import open_encoder
from mmclip_dist.evaluate.zeroshot import ZeroShot, save_result
from mmclip_dist.export import export as module
from mmclip_dist.export.export import export
from mmclip_dist.export.remote_code.image_processing_mmclip import MMCLIPImageProcessor
from mmclip_dist.model.build import build_model

pytestmark = pytest.mark.slow
TEXTS = ["There is effusion.", "No evidence of effusion.", "Heart size is normal; the lungs are clear."]
LOADED = """
import json, sys
import torch
from transformers import AutoModel, AutoProcessor
folder, image, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
with torch.inference_mode():
    found = model(**processor(images=[image], text=texts))
assert not [name for name in sys.modules if name.startswith("mmclip")], "the folder needs the package that wrote it"
print(json.dumps({"image": found.image_embeds.tolist(), "text": found.text_embeds.tolist(),
                  "logits": found.logits_per_image.tolist()}))
"""


@pytest.fixture(scope="module")
def run(sets, tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with one checkpoint of random weights."""
    torch.manual_seed(0)
    manifest, folder = load_manifest(sets.paired), tmp_path_factory.mktemp("exported")
    checkpoint_path(folder, 3).mkdir(parents=True)
    model = build_model(sets.config(), tokenizer, manifest.labels)
    trained_on = tuple(shard.sha256 for shard in manifest.shards)
    write_model(checkpoint_path(folder, 3), model, tokenizer, sets.config(), Meta(3, 1, 1, manifest.labels, trained_on))
    return folder


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    destination = tmp_path_factory.mktemp("export") / "model"
    export(str(run), destination, "hf")
    return destination


@pytest.fixture(scope="module")
def radiograph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "chest.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 60000, (50, 44), dtype=np.uint16)).save(path)  # 16 bits
    return path


def as_trained(run: Path, images: list[Path], texts: list[str], average: bool = False) -> tuple[torch.Tensor, ...]:
    """Embeddings by the model as it was trained, [N, E] and [M, E], and its scale [1]."""
    with open_encoder(str(run), average=average) as encoder, encoder.evaluating():
        pixels = torch.stack([encoder.pixels(decode_image(path)) for path in images])
        return encoder.embed_images(pixels), encoder.embed_texts(texts), encoder.model.scale().detach()


def test_transformers_alone_gives_the_models_embeddings(run: Path, exported: Path, radiograph: Path, tmp_path: Path) -> None:
    """In a process that has imported nothing of ours; a 16-bit file goes through the folder's own decoder."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(
        [sys.executable, "-c", LOADED, str(exported), str(radiograph), json.dumps(TEXTS)], env=env, cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-2000:]
    values = json.loads(found.stdout.splitlines()[-1])
    image, text, scale = as_trained(run, [radiograph], TEXTS)
    torch.testing.assert_close(torch.tensor(values["image"]), image, atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.tensor(values["text"]), text, atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.tensor(values["logits"]), scale * image @ text.T, atol=1e-4, rtol=0)


def test_the_image_tower_is_a_siglip_model(run: Path, radiograph: Path, tmp_path: Path) -> None:
    export(str(run), tmp_path / "out", "siglip-tower")
    tower = SiglipVisionModel.from_pretrained(tmp_path / "out" / "siglip-tower").eval()
    model = load_model(checkpoint_path(run, 3))[0]
    pixels = torch.from_numpy(crop_image(Image.open(radiograph).convert("L"), WHOLE, model.config.model.image.size))[None]
    with torch.inference_mode():
        pooled = tower(pixels.expand(-1, 3, -1, -1)).pooler_output
        features = model.image.encode(model.image.embed(pixels)).mean(1)
    torch.testing.assert_close(pooled, features, atol=1e-6, rtol=1e-6)


def test_onnx_files_give_the_models_embeddings(run: Path, radiograph: Path, tmp_path: Path) -> None:
    for name in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name, reason=f"ONNX EXPORT NOT TESTED: {name} is missing; pip install mmclip-dist[export]")
    lines = export(str(run), tmp_path / "out", "all")
    assert any(line.startswith("onnx: at most ") for line in lines)
    written = {path.name for path in (tmp_path / "out" / "onnx").glob("*.onnx")}
    assert written == {"model.onnx", "vision_model.onnx", "text_model.onnx"}


def test_the_python_interface_opens_an_export(run: Path, exported: Path, radiograph: Path, tmp_path: Path) -> None:
    """Offline, without running the code that lies in the folder, and with all that it gives for a run."""
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    for code in copy.glob("*.py"):
        code.write_text("raise SystemExit('code of the folder was run')")
    model, trained = MMCLIPModel.from_pretrained(copy, device="cpu"), MMCLIPModel.from_pretrained(run, device="cpu")
    image, text, _ = as_trained(run, [radiograph], TEXTS)
    torch.testing.assert_close(model.encode_image(radiograph), image, atol=1e-6, rtol=0)
    torch.testing.assert_close(model.encode_text(TEXTS), text, atol=1e-6, rtol=0)
    prompts = {"Effusion": TEXTS[:1]}, {"Effusion": TEXTS[1:2]}
    for mine, its in zip(model.zero_shot(radiograph, *prompts), trained.zero_shot(radiograph, *prompts), strict=True):
        assert mine == its if isinstance(mine, tuple) else torch.allclose(mine, its, atol=1e-6)
    heats = [one.attention_map(radiograph, "effusion") for one in (model, trained)]
    torch.testing.assert_close(*heats, atol=1e-6, rtol=0)


def test_exports_that_cannot_be_opened(exported: Path, run: Path, tmp_path: Path) -> None:
    def refused(message: str, folder: Path, **options: bool) -> None:
        with pytest.raises(ValueError, match=message) as error:
            MMCLIPModel.from_pretrained(folder, device="cpu", **options)
        assert "\n" not in str(error.value)

    def changed(name: str, **values: object) -> Path:
        copy = tmp_path / name
        shutil.copytree(exported, copy)
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | values))
        return copy

    refused("is an export, which has one set of weights", exported, average=True)
    refused("has format version 2, .* reads 1: export the model again, or install", changed("newer", format_version=2))
    refused("holds a model of type 'clip', not one of `mmclip export", changed("clip", model_type="clip"))
    refused("narrow cannot be read .*size mismatch.*: export the model again", changed("narrow", projection_dim=8))
    torn, pickled, bare = changed("torn"), changed("pickled"), changed("bare")
    (torn / "model.safetensors").write_bytes((exported / "model.safetensors").read_bytes()[:5000])
    refused("torn cannot be read .*: export the model again", torn)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    refused("pickled cannot be read .*: export the model again", pickled)  # weights in a pickle are never loaded
    (bare / "config.json").unlink()
    refused("is an export without the form hf: export the run again with --format hf", bare)
    less = changed("less")
    weights = load_file(less / "model.safetensors")
    weights.pop("text_projection.weight")
    save_file(weights, less / "model.safetensors")
    refused(r"less cannot be read .*Missing key.*text_projection.weight", less)


def test_the_average_of_the_weights_is_exported(run: Path, radiograph: Path, tmp_path: Path) -> None:
    """And not the last weights, from which it differs."""
    averaged = tmp_path / "run"
    shutil.copytree(run, averaged)
    folder = checkpoint_path(averaged, 3)
    weights = load_file(folder / WEIGHTS)
    noise = torch.Generator().manual_seed(1)
    save_file({name: value + 0.05 * torch.randn(value.shape, generator=noise) for name, value in weights.items()},
              folder / AVERAGED_WEIGHTS)  # fmt: skip
    export(str(averaged), tmp_path / "out", "hf", average=True)
    model = MMCLIPModel.from_pretrained(tmp_path / "out", device="cpu")
    image, text, _ = as_trained(averaged, [radiograph], TEXTS, average=True)
    torch.testing.assert_close(model.encode_image(radiograph), image, atol=1e-6, rtol=0)
    torch.testing.assert_close(model.encode_text(TEXTS), text, atol=1e-6, rtol=0)
    assert not torch.allclose(image, as_trained(run, [radiograph], TEXTS)[0], atol=1e-3)
    facts = json.loads((tmp_path / "out" / "training.json").read_text())
    assert facts["average"] and facts["weights"] == weights_hash(folder, average=True)
    with pytest.raises(ValueError, match="kept no average"):
        export(str(run), tmp_path / "other", "hf", average=True)


def kinds_of_png(folder: Path) -> dict[str, Path]:
    """One picture as files of every kind."""
    values = np.random.default_rng(2).integers(0, 256, (50, 44), dtype=np.uint8)
    plain = Image.fromarray(values)
    hidden = plain.convert("RGBA")
    hidden.putalpha(Image.fromarray(np.where(values > 99, 255, 0).astype(np.uint8)))
    made = {
        "grey": plain, "rgb": plain.convert("RGB"), "colour": Image.fromarray(np.stack([values, values // 2, values // 3], -1)),
        "rgba": hidden, "la": hidden.convert("LA"), "palette": plain.convert("P"), "two": plain.convert("1"),
        "deep": Image.fromarray(values.astype(np.uint16) * 200 + 1000),
    }  # fmt: skip
    for name, image in made.items():
        image.save(folder / f"{name}.png")
    return {name: folder / f"{name}.png" for name in made}


def test_a_png_of_any_kind_is_the_same_tensor_or_refused(run: Path, tmp_path: Path) -> None:
    """Never clipped, and nothing that is transparent shows. open_clip's transform: bench/results/export.md."""
    export(str(run), tmp_path / "out", "siglip-tower")
    siglip = AutoImageProcessor.from_pretrained(tmp_path / "out" / "siglip-tower")
    for kind, path in kinds_of_png(tmp_path).items():
        ours = torch.from_numpy(crop_image(decode_image(path), WHOLE, 32))
        exported = MMCLIPImageProcessor(size=32)
        assert torch.equal(exported(str(path))["pixel_values"][0], ours), kind
        assert torch.equal(exported(Image.open(path))["pixel_values"][0], ours), kind
        made = siglip(images=grey_image(Image.open(path)).convert("RGB"), return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(made, ours.expand(3, -1, -1), atol=1e-6, rtol=0)
        if kind not in ("rgb", "colour"):
            with pytest.raises((ValueError, RuntimeError)):
                siglip(images=Image.open(path), return_tensors="pt")
    assert (tmp_path / "out" / "siglip-tower" / "grey.py").read_text() == Path(grey.__file__).read_text()


def test_the_folder_holds_safetensors_and_a_card(run: Path, exported: Path, sets) -> None:
    assert not [path for path in exported.rglob("*") if path.suffix in {".bin", ".pt", ".pth", ".pkl"}]
    assert len(load_file(exported / "model.safetensors")) > 10
    card, facts = (exported / "README.md").read_text(), json.loads((exported / "training.json").read_text())
    assert "Not a medical device" in card and "arXiv 2407.19546" in card and "## Limits" in card and "## How to cite" in card
    assert facts["sets"][0]["shards"] == [shard.sha256 for shard in load_manifest(sets.paired).shards]
    assert facts["weights"] == weights_hash(checkpoint_path(run, 3), average=False) and str(run) not in card


@pytest.fixture(scope="module")
def of_terms(run: Path, sets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two sets, of which one states its terms and one does not; a third is gone."""
    folder = tmp_path_factory.mktemp("terms")
    terms = {"licence": "Credentialed Data License 1.5", "access": "course | form"}
    stated = replace(load_manifest(sets.paired), dataset="mimic-cxr", **terms)
    for name, manifest in (("stated", stated), ("silent", load_manifest(sets.unpaired))):
        (folder / name).mkdir()
        save_manifest(str(folder / name), manifest)
    shutil.copytree(run, folder / "run")
    checkpoint = checkpoint_path(folder / "run", 3)
    sources = [{"url": str(folder / name)} for name in ("stated", "silent", "gone")]
    (checkpoint / CONFIG).write_text(dump_config(sets.config(f"data.sources={json.dumps(sources)}")))
    seen = [shard.sha256 for url in (sets.paired, sets.unpaired) for shard in load_manifest(url).shards]
    meta = json.loads((checkpoint / META).read_text()) | {"trained_on": [*seen, "f" * 64]}
    (checkpoint / META).write_text(json.dumps(meta))
    return folder / "run"


def head_of(folder: Path) -> ModelCardData:
    """What a hub reads of the card, by its own parser."""
    return ModelCard.load(folder / "README.md").data


def test_the_card_carries_the_terms_of_each_set(of_terms: Path, sets, tmp_path: Path) -> None:
    export(str(of_terms), tmp_path / "out", "hf")
    card, facts = (tmp_path / "out" / "README.md").read_text(), json.loads((tmp_path / "out" / "training.json").read_text())
    lines = [line for line in card.splitlines() if line.startswith("| ") and "training.json" in line]
    paired, unpaired = load_manifest(sets.paired), load_manifest(sets.unpaired)
    assert lines[0].startswith(f"| mimic-cxr/train | {paired.samples} | Credentialed Data License 1.5 | course \\| form | ")
    assert paired.shards[0].sha256[:16] in lines[0]
    assert lines[1].startswith(f"| {unpaired.dataset}/train | {unpaired.samples} | not stated | not stated | ")
    assert lines[2].startswith("| sets that could not be read at export | ? | not stated | not stated | 1 in `training.json`")
    assert [one["licence"] for one in facts["sets"]] == ["Credentialed Data License 1.5", None, None]
    assert facts["sets"][2]["shards"] == ["f" * 64]
    head = head_of(tmp_path / "out")
    assert (head.license, head.license_name) == ("other", "terms-of-the-training-data") and "apache" not in card.lower()


def test_a_licence_is_what_the_user_states(of_terms: Path, tmp_path: Path) -> None:
    export(str(of_terms), tmp_path / "out", "hf", license="apache-2.0")
    card = (tmp_path / "out" / "README.md").read_text()
    assert head_of(tmp_path / "out").license == "apache-2.0" and head_of(tmp_path / "out").license_name is None
    assert "as whoever exported them stated" in card and "| Credentialed Data License 1.5 |" in card


def test_the_command_writes_the_scores_of_these_weights(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = weights_hash(checkpoint_path(run, 3), average=False)
    nan = float("nan")
    result = ZeroShot(
        0.7, (0.6, 0.8), {"Nodule": 0.7, "A|B": 0.71}, ("Mass",), 10, (), 9, ("set/test",), weights,
        {"Nodule": (0.65, 0.75), "A|B": (nan, nan)}, "own",
    )  # fmt: skip
    save_result(result, tmp_path / "scores.json")
    assert call("export", str(run), str(tmp_path / "out"), "--metrics", str(tmp_path / "scores.json")) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| Nodule | 0.700 (95% 0.650 to 0.750) |" in card and "| A\\|B | 0.710 |" in card
    assert "| macro | 0.700 (95% 0.600 to 0.800) |" in card and "protocol `own`, 10 images of 9 patients" in card
    assert "for want of positives or negatives: Mass." in card
    (found,) = head_of(tmp_path / "out").eval_results
    assert (found.metric_type, found.metric_value, found.dataset_name) == ("roc_auc", 0.7, "set/test")
    assert found.metric_name == "macro AUROC (95% 0.600 to 0.800)"
    save_result(ZeroShot(**{**vars(result), "checkpoint": "0" * 64}), tmp_path / "scores.json")
    capsys.readouterr()
    assert call("export", str(run), str(tmp_path / "other"), "--metrics", str(tmp_path / "scores.json")) == 2
    assert "other weights" in capsys.readouterr().err and not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("format", "message"),
    [("pickle", "'pickle' is unknown: choose one of hf, siglip-tower, open_clip, onnx or all"),
     ("open_clip", "open_clip cannot hold this model: no ViT")],
)  # fmt: skip
def test_forms_that_cannot_be_written(run: Path, tmp_path: Path, format: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export(str(run), tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_never_written_over(run: Path, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds something already"):
        export(str(run), exported, "hf")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="holds something already"):
        export(str(run), tmp_path / "file", "hf")
    with pytest.raises(ValueError, match="no checkpoint at"):
        export(str(exported), tmp_path / "out", "hf")


def test_an_export_that_fails_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(module, "write_hf", full)
    with pytest.raises(OSError, match="No space left"):
        export(str(run), tmp_path / "out", "hf")
    assert list(tmp_path.iterdir()) == []


def call(*words: str) -> int:
    """Exit code of `mmclip ...`, in this process."""
    argv, sys.argv = sys.argv, ["mmclip", *words]
    try:
        return run_command(app)
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = argv
