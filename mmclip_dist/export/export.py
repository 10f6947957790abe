"""Export a checkpoint: all chosen forms in one folder, which appears whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp

from safetensors import SafetensorError

from mmclip_dist.checkpoint.folder import weights_hash
from mmclip_dist.checkpoint.mirror import local_checkpoint
from mmclip_dist.checkpoint.model_files import load_model
from mmclip_dist.data.prompts import prompts_text
from mmclip_dist.evaluate.zeroshot import ZeroShot
from mmclip_dist.export.card import card, trained_on
from mmclip_dist.export.dual_encoder import dual_encoder
from mmclip_dist.export.hf_folder import ABOUT, write_hf, write_json
from mmclip_dist.export.onnx_files import write_onnx
from mmclip_dist.export.open_clip_folder import unfit, write_open_clip
from mmclip_dist.export.siglip_tower import write_siglip_tower

FORMATS = ("hf", "siglip-tower", "open_clip", "onnx")


def export(
    checkpoint: str, destination: Path, format: str, *, average: bool = False, license: str | None = None,
    result: ZeroShot | None = None,
) -> list[str]:  # fmt: skip
    """Write a checkpoint (a run's or a mirror's newest) in one of FORMATS, or `all` of them. -> lines that say what was written

    hf lies in the folder itself, the others in subfolders of their names. average: the exponential average of the weights.
    license: of the weights, for the card. result: of an evaluation of these weights, for the card. ValueError if the
    destination holds something, for an unknown form, for one that the model does not fit (`all` leaves it out and says so),
    or if the result is of other weights.
    """
    if format not in (*FORMATS, "all"):
        raise ValueError(f"the form {format!r} is unknown: choose one of {', '.join(FORMATS)} or all")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination} holds something already: name a new folder, or remove it first")
    with local_checkpoint(checkpoint) as folder:
        try:
            model, tokenizer, config, meta = load_model(folder, average=average)
        except SafetensorError as error:
            raise ValueError(f"the weights in {folder} are damaged ({error}): name another checkpoint") from error
        weights, prompts = weights_hash(folder, average=average), prompts_text(config.prompts.file)
    if result is not None and result.checkpoint != weights:
        raise ValueError("the result is of other weights than these: evaluate this checkpoint, with --average if you export that")
    encoder = dual_encoder(model)
    formats, said = _chosen(format, unfit(encoder))
    sets = trained_on(config, meta)
    destination.parent.mkdir(parents=True, exist_ok=True)
    made = Path(mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    try:
        if "hf" in formats:
            write_hf(made, encoder, tokenizer, prompts)
        if "siglip-tower" in formats:
            write_siglip_tower(made / "siglip-tower", encoder)
        if "open_clip" in formats:
            write_open_clip(made / "open_clip", encoder, tokenizer, destination.resolve() / "open_clip")
        if "onnx" in formats:
            difference = write_onnx(made / "onnx", encoder, tokenizer)
            said.append(f"onnx: at most {difference:.1e} from PyTorch, at several batch sizes and lengths")
        write_json(
            made / ABOUT,
            {"step": meta.step, "weights": weights, "average": average, "sets": [vars(one) for one in sets]},
        )
        (made / "README.md").write_text(
            card(
                config, meta, sets, weights=weights, license=license, result=result, formats=formats,
                image_size=model.config.model.image.size,
            ),
            encoding="utf-8",
        )  # fmt: skip
        made.chmod(0o755)
        if destination.exists():
            destination.rmdir()
        made.rename(destination)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return [f"{', '.join(formats)}: {destination}", *said]


def _chosen(format: str, fault: str | None) -> tuple[Sequence[str], list[str]]:
    if format == "open_clip" and fault:
        raise ValueError(f"open_clip cannot hold this model: {fault}")
    if format != "all":
        return (format,), []
    if fault is None:
        return FORMATS, []
    return tuple(name for name in FORMATS if name != "open_clip"), [f"open_clip: left out, {fault}"]
