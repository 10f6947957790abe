"""Exports read back by the programs that they are for: how far their numbers are from ours, and what ONNX costs on a CPU.

    python -m mmclip_dist.bench.export_roundtrip [--checkpoint RUN] [--rounds 15]

Needs open_clip and ONNX: pip install "mmclip-dist[bench,export]", in an environment of its own. The model is a ViT-B/16 with a
BERT of 6 layers and random weights, unless a checkpoint is named. Images and texts are 8 each, texts of several lengths in one
padded batch. Writes results/export.md.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def declare_torchvision() -> torch.library.Library | None:
    """Let open_clip and transformers import torchvision beside a PyTorch for the CPU. PyPI's wheel of torchvision needs CUDA's
    libraries for its operators, and without them its import fails where it describes two of these. Nobody here calls them; so
    they are declared, for as long as the library that is returned lives, and have no code."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return None
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


_OPERATORS = declare_torchvision()  # before the first import of transformers, which looks for torchvision

import numpy as np  # noqa: E402
from mmclip_shards.datasets.synthetic.set import pack_synthetic  # noqa: E402
from mmclip_shards.grey import grey_image  # noqa: E402
from mmclip_shards.images import decode_image  # noqa: E402
from mmclip_shards.manifest import load_manifest  # noqa: E402
from mmclip_shards.reader import iterate  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402

from mmclip_dist.checkpoint.folder import Meta, checkpoint_path  # noqa: E402
from mmclip_dist.checkpoint.model_files import write_model  # noqa: E402
from mmclip_dist.config import load_config  # noqa: E402
from mmclip_dist.data.tokenizer import save_tokenizer, tokenizer_of_sets  # noqa: E402
from mmclip_dist.evaluate import tasks  # noqa: E402
from mmclip_dist.evaluate.encoders import Encoder, open_encoder  # noqa: E402
from mmclip_dist.evaluate.protocol import load_protocol  # noqa: E402
from mmclip_dist.export.export import export  # noqa: E402
from mmclip_dist.model.build import build_model  # noqa: E402

RESULTS = Path(__file__).with_name("results")
TEXTS = (
    "There is effusion.", "No evidence of a pneumothorax in the left lung, which is clear.", "Cardiomegaly",
    "Heart size is normal.",
    "Mild atelectasis of the right base with a small pleural effusion; no consolidation, no pneumothorax, no fracture.",
    "Edema", "The lungs are clear.", "Possible nodule in the right upper lobe, unchanged.",
)  # fmt: skip
TEXT = ("model.text.width=384", "model.text.depth=6", "model.text.heads=6")
PEER = "ViT-S-32-alt"
"""An open_clip model with its own tokenizer, small."""


@dataclass(frozen=True)
class Embedded:
    """images, texts [8, E], L2-normalised."""

    images: Tensor
    texts: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", help="a run; by default random weights are made")
    parser.add_argument("--rounds", type=int, default=15, help="of the timings")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "set"
        pack_synthetic(str(data), 120, seed=5, size=256, splits={"train": 0.5, "val": 0.2, "test": 0.3})
        run = arguments.checkpoint or str(random_run(folder, data))
        out = folder / "export"
        said = export(run, out, "all")
        print(*said, sep="\n", flush=True)
        images = radiographs(data, folder)
        trips = round_trips(run, out, images)
        same = same_png(run, out, folder, images[0])
        models = evaluated(out, data)
        speed = speeds(out, arguments.rounds)
    page = publish(trips, [line for line in said if line.startswith("onnx")], same, models, speed, arguments)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "export.md").write_text(page, encoding="utf-8")
    print(page)


def random_run(folder: Path, data: Path) -> Path:
    tokenizer = tokenizer_of_sets([str(data / "train")])
    save_tokenizer(tokenizer, folder / "tokenizer")
    config = load_config("mmclip_vit_b16", [f"model.text.tokenizer={folder / 'tokenizer'}", f"run_dir={folder / 'run'}", *TEXT])
    diseases = load_manifest(str(data / "test")).labels
    checkpoint_path(folder / "run", 1).mkdir(parents=True)
    model = build_model(config, tokenizer, diseases)
    write_model(checkpoint_path(folder / "run", 1), model, tokenizer, config, Meta(1, 1, 1, diseases, ()))
    return folder / "run"


def radiographs(data: Path, folder: Path) -> list[Path]:
    found = []
    for number, (_, members) in zip(range(8), iterate(str(data / "test")), strict=False):
        found.append(folder / f"{number}.png")
        decode_image(members.get("png") or members["jpg"]).save(found[-1])
    return found


# -- Numbers ----------------------------------------------------------------------------------------------------------


def by_encoder(encoder: Encoder, images: list[Path]) -> Embedded:
    with encoder.evaluating():
        pixels = torch.stack([encoder.pixels(decode_image(path)) for path in images])
        return Embedded(encoder.embed_images(pixels), encoder.embed_texts(TEXTS))


def round_trips(run: str, out: Path, images: list[Path]) -> list[tuple[str, float, float]]:
    """Name of a form, largest difference of an image-text cosine, largest 1 - cosine of an embedding with ours."""
    with open_encoder(run) as encoder:
        ours = by_encoder(encoder, images)
        with encoder.evaluating():
            pixels = torch.stack([encoder.pixels(decode_image(path)) for path in images])
            features = encoder.features(pixels)
    rows = []
    for name, theirs in (
        ("hf: AutoModel, AutoProcessor", by_auto(out, images)),
        ("open_clip: its model, transform and tokenizer", by_open_clip(out, images)),
        ("onnx: model.onnx", by_onnx(out, images)),
    ):  # fmt: skip
        rows.append((name, *differences(ours, theirs)))
    from transformers import SiglipVisionModel

    tower = SiglipVisionModel.from_pretrained(out / "siglip-tower").eval()
    with torch.inference_mode():
        pooled = tower(pixels.expand(-1, 3, -1, -1)).pooler_output
    rows.append(("siglip-tower: SiglipVisionModel, its pooler", float("nan"), furthest(features, pooled)))
    return rows


def differences(ours: Embedded, theirs: Embedded) -> tuple[float, float]:
    """Largest difference of the 64 cosines of images and texts; largest 1 - cosine of an embedding of one with the other's."""
    apart = max(furthest(ours.images, theirs.images), furthest(ours.texts, theirs.texts))
    return float((ours.images @ ours.texts.T - theirs.images @ theirs.texts.T).abs().max()), apart


def furthest(ours: Tensor, theirs: Tensor) -> float:
    return float((1 - torch.nn.functional.cosine_similarity(ours.double(), theirs.double())).max())


@torch.inference_mode()
def by_auto(out: Path, images: list[Path]) -> Embedded:
    from transformers import AutoModel, AutoProcessor

    model = AutoModel.from_pretrained(out, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(out, trust_remote_code=True)
    found = model(**processor(images=list(map(str, images)), text=list(TEXTS)))
    return Embedded(found.image_embeds, found.text_embeds)


@torch.inference_mode()
def by_open_clip(out: Path, images: list[Path]) -> Embedded:
    import open_clip

    name = f"local-dir:{out / 'open_clip'}"
    model, transform = open_clip.create_model_from_pretrained(name)
    words = open_clip.get_tokenizer(name)(list(TEXTS))
    pixels = torch.stack([transform(Image.open(path)) for path in images])
    model.eval()
    return Embedded(model.encode_image(pixels, normalize=True), model.encode_text(words, normalize=True))


def by_onnx(out: Path, images: list[Path]) -> Embedded:
    from transformers import AutoProcessor

    made = AutoProcessor.from_pretrained(out, trust_remote_code=True)(images=list(map(str, images)), text=list(TEXTS))
    session = onnx_session(out / "onnx" / "model.onnx")
    values = {one.name: np.asarray(made[one.name]) for one in session.get_inputs()}
    images_, texts = session.run(["image_embeds", "text_embeds"], values)
    return Embedded(torch.from_numpy(images_), torch.from_numpy(texts))


def onnx_session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


# -- One PNG through every transform ----------------------------------------------------------------------------------


def same_png(run: str, out: Path, folder: Path, drawn: Path) -> list[tuple[str, ...]]:
    """Kind of file, and by transform: the largest difference of the tensor from ours, or how it is refused."""
    import open_clip
    from transformers import AutoImageProcessor

    hf = AutoImageProcessor.from_pretrained(out, trust_remote_code=True)
    siglip = AutoImageProcessor.from_pretrained(out / "siglip-tower")
    _, transform = open_clip.create_model_from_pretrained(f"local-dir:{out / 'open_clip'}")

    def by_siglip(image: Image.Image) -> Any:
        return siglip(images=image, return_tensors="pt")["pixel_values"][0]

    rows = []
    with open_encoder(run) as encoder:
        for kind, path in kinds_of(Image.open(drawn), folder).items():
            ours = encoder.pixels(decode_image(path)).expand(3, -1, -1)
            opened = Image.open(path)
            by_transform: list[Callable[[], Any]] = [
                partial(lambda path: hf(str(path))["pixel_values"][0].expand(3, -1, -1), path),
                partial(by_siglip, opened),
                partial(lambda image: by_siglip(grey_image(image).convert("RGB")), opened),
                partial(transform, opened),
                partial(lambda image: transform(grey_image(image)), opened),
            ]
            rows.append((kind, *(compared(ours, make) for make in by_transform)))
    return rows


def kinds_of(image: Image.Image, folder: Path) -> dict[str, Path]:
    """One picture as files of several kinds."""
    values = np.asarray(image.convert("L"))
    deep = Image.fromarray(values.astype(np.uint16) * 200 + 1000)
    hidden = image.convert("RGBA")
    hidden.putalpha(Image.fromarray(np.full(values.shape, [0] * 20 + [255] * (values.shape[1] - 20), np.uint8)))
    tinted = Image.fromarray(np.stack([values, values // 2, values], -1))
    made = {
        "8-bit grey": image.convert("L"), "grey as RGB": image.convert("RGB"), "coloured RGB": tinted,
        "RGBA, partly clear": hidden, "16-bit grey": deep,
    }  # fmt: skip
    found = {}
    for kind, one in made.items():
        found[kind] = folder / f"{kind.replace(' ', '-').replace(',', '')}.png"
        one.save(found[kind])
    return found


def compared(ours: Tensor, make: Callable[[], Any]) -> str:
    try:
        theirs = torch.as_tensor(make())
    except (ValueError, RuntimeError, IndexError, TypeError) as error:
        return f"refused ({type(error).__name__})"
    if theirs.shape != ours.shape:
        return f"refused by the model (shape {list(theirs.shape)})"
    apart = float((theirs - ours).abs().max())
    return "equal" if apart == 0 else f"{apart:.1e}"


# -- Evaluation of open_clip's models ---------------------------------------------------------------------------------


def evaluated(out: Path, data: Path) -> list[tuple[str, str, str]]:
    """Model, task, and what came out: the tasks of `mmclip evaluate` on models that open_clip itself builds."""
    rows = []
    for name in (f"open_clip:{PEER}", f"open_clip:local-dir:{out / 'open_clip'}", f"hf:{out}"):
        with open_encoder(name, trust_remote_code=True) as encoder, tempfile.TemporaryDirectory() as cache:
            request = tasks.Request(encoder, [str(data)], load_protocol("own"))
            shown = name.replace(str(out), "EXPORT")
            for task, run in (
                ("zeroshot", tasks.zeroshot), ("retrieval", tasks.retrieval),
                ("probe", lambda asked, cache=cache: tasks.linear_probe(asked, Path(cache))), ("pointing", tasks.pointing),
            ):  # fmt: skip
                try:
                    found = run(request).document
                    rows.append((shown, task, headline(task, found)))
                except ValueError as error:
                    rows.append((shown, task, f"refused: {str(error).replace(str(out), 'EXPORT')}"))
                print(*rows[-1], flush=True)
    return rows


def headline(task: str, found: dict[str, Any]) -> str:
    if task == "zeroshot":
        return f"AUROC {found['auroc_macro']:.4f}"
    if task == "probe":
        return f"AUROC {found['results'][-1]['auroc_macro']:.4f} with all labels"
    one = found["results"]["image_to_text_each"] if task == "retrieval" else found["results"]["macro"]
    return f"R@10 {one['R@10']:.4f}" if task == "retrieval" else f"maximum in box {one['hit']:.4f}"


# -- Speed ------------------------------------------------------------------------------------------------------------


def speeds(out: Path, rounds: int) -> list[tuple[str, str, float, float, float]]:
    """File, input, milliseconds of eager PyTorch, of ONNX Runtime, and the median of the rounds' ratios. One thread, processor
    time, in turn."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(out, trust_remote_code=True).eval()
    side = model.config.vision_config.image_size
    pixels = torch.randn(1, 1, side, side)
    rows = []
    for file, method, inputs, about in (
        ("vision_model.onnx", model.get_image_features, {"pixel_values": pixels}, "1 image"),
        ("text_model.onnx", model.get_text_features, text_of(16), "1 text of 16 tokens"),
        ("text_model.onnx", model.get_text_features, text_of(112), "1 text of 112 tokens"),
        ("model.onnx", model.forward, {"pixel_values": pixels, **text_of(16)}, "1 image, 1 text of 16 tokens"),
    ):
        session = onnx_session(out / "onnx" / file)
        values = {name: value.numpy() for name, value in inputs.items()}

        def eager(method: Any = method, inputs: Any = inputs) -> None:
            method(**inputs)

        def runtime(session: Any = session, values: Any = values) -> None:
            session.run(None, values)

        with torch.inference_mode():
            for call in (eager, runtime):
                call()
            pairs = [(took(eager), took(runtime)) for _ in range(rounds)]
        ratio = statistics.median(mine / its for mine, its in pairs)
        mine, its = (statistics.median(column) for column in zip(*pairs, strict=True))
        rows.append((file, about, 1e3 * mine, 1e3 * its, ratio))
        print(*rows[-1], flush=True)
    return rows


def text_of(tokens: int) -> dict[str, Tensor]:
    drawn = torch.randint(5, 60, (1, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": drawn, "attention_mask": torch.ones_like(drawn)}


def took(call: Callable[[], None]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


# -- The page ---------------------------------------------------------------------------------------------------------


def publish(
    trips: list[tuple[str, float, float]], onnx: list[str], same: Sequence[tuple[str, ...]], models: Sequence[tuple[str, ...]],
    speed: list[tuple[str, str, float, float, float]], arguments: argparse.Namespace,
) -> str:  # fmt: skip
    names = ("torch", "transformers", "open_clip_torch", "timm", "torchvision", "onnx", "onnxruntime", "Pillow")
    command, weights = "python -m mmclip_dist.bench.export_roundtrip", "random weights, 384 wide and 6 deep"
    if arguments.checkpoint:
        command, weights = f"{command} --checkpoint {arguments.checkpoint}", "the weights of a run"
    lines = [
        "# Exports, read back", "",
        f"`{command}`, {datetime.datetime.now(datetime.UTC).date()}, {len(os.sched_getaffinity(0))} shared CPU cores, Python "
        f"{platform.python_version()}, {', '.join(f'{name} {version(name)}' for name in names)}. ViT-B/16 at 224 and a BERT, "
        f"{weights}; 8 drawn radiographs, 8 texts of several lengths in one padded batch.", "",
        "| form, read by | largest difference of an image-text cosine | largest 1 - cosine with our embedding |", "|---|---|---|",
        *(f"| {name} | {'' if np.isnan(cosine) else f'{cosine:.1e}'} | {apart:.1e} |" for name, cosine, apart in trips), "",
        *(f"{line[0].upper()}{line[1:]}; the three files, on drawn inputs." for line in onnx), "",
        "## The same PNG through every transform", "",
        "Largest difference of the tensor from our own decoder's; one step of an 8-bit value is 1.6e-02. open_clip's own "
        "transform clips 16-bit files and reads coloured and clear pixels otherwise, which its configuration cannot forbid: "
        "hence `grey.py` in the folder, and the lines on the card that use it.", "",
        "| file | hf | siglip-tower | siglip-tower after `grey_image` | open_clip | open_clip after `grey_image` |",
        "|---|---|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in same), "",
        "## `mmclip evaluate` on models that open_clip builds", "",
        "Drawn radiographs and random weights: that they run, and that the export in both forms gives the same figures.", "",
        "| model | task | result |", "|---|---|---|", *(f"| `{model}` | {task} | {found} |" for model, task, found in models), "",
        "## ONNX Runtime on a CPU", "",
        f"One thread each, processor time, in turn, medians of {arguments.rounds}; a ratio is the median of the rounds' own.", "",
        "| file | input | eager PyTorch, ms | ONNX Runtime, ms | PyTorch / ONNX |", "|---|---|---|---|---|",
        *(f"| {file} | {about} | {mine:.1f} | {its:.1f} | {ratio:.2f} |" for file, about, mine, its, ratio in speed),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
