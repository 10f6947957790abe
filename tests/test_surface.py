"""The names that a user imports: what they are, that they cost nothing until they are used, and that they suffice."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from mmclip_shards import decode_image, load_manifest

import mmclip_dist
from mmclip_dist import config
from mmclip_dist.checkpoint.folder import checkpoint_path
from mmclip_dist.checkpoint.model_files import write_model
from mmclip_dist.commands import options

HEAVY = ("torch", "transformers", "ray", "deepspeed", "scipy", "pydantic", "webdataset")


def imported_by(statement: str) -> set[str]:
    """Which heavy packages a statement imports in a fresh interpreter."""
    code = f"{statement}\nimport sys\nprint(*(name for name in {HEAVY} if name in sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_a_choice_that_is_named_twice_is_the_same() -> None:
    assert options.Precision == config.Precision


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert imported_by("import mmclip_dist; dir(mmclip_dist); mmclip_dist.__version__") == set()
    assert imported_by("import mmclip_launch.commands") == set()
    assert "pydantic" in imported_by("from mmclip_dist import Config")


def test_starting_a_stage_loads_no_model() -> None:
    """On a cluster, the process that starts a stage only hands it to the workers."""
    for stage in ("entities", "attention"):
        assert imported_by(f"import mmclip_dist.offline.{stage}") == {"pydantic", "ray"}


def test_every_name_resolves_to_its_home() -> None:
    assert set(dir(mmclip_dist)) == set(mmclip_dist.__all__) == {*mmclip_dist._HOMES, "__version__"}
    for name, home in mmclip_dist._HOMES.items():
        value = getattr(mmclip_dist, name)
        assert value is getattr(import_module(f"mmclip_dist.{home}"), name)
        assert getattr(value, "__module__", None) == f"mmclip_dist.{home}", f"{name} comes from another module"


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(mmclip_dist.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {
        alias.asname: (node.module or "").removeprefix("mmclip_dist.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == mmclip_dist._HOMES


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'load_modle'"):
        mmclip_dist.load_modle  # noqa: B018
    with pytest.raises(ImportError):
        from mmclip_dist import load_modle  # noqa: F401


@pytest.mark.parametrize("module", ["mmclip_dist.cli", "mmclip_launch.cli"])
def test_the_command_tells_its_version(module: str) -> None:
    found = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True)
    assert found.stdout == f"mmclip-dist {mmclip_dist.__version__}\n"


def test_the_shell_completes_commands() -> None:
    code = "import sys; sys.argv = ['mmclip']; from mmclip_launch.cli import main; sys.exit(main())"
    environment = os.environ | {"_MMCLIP_COMPLETE": "complete_bash", "COMP_WORDS": "mmclip qui", "COMP_CWORD": "1"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["quickstart"]


def test_a_checkpoint_embeds_images_and_texts(sets, tokenizer, tmp_path: Path) -> None:
    """As the package's docstring shows: a file becomes the same embedding as evaluation makes of a packed sample."""
    diseases = load_manifest(sets.test).labels
    folder = checkpoint_path(tmp_path, 3)
    folder.mkdir(parents=True)
    made = mmclip_dist.build_model(sets.config(), tokenizer, diseases)
    write_model(folder, made, tokenizer, sets.config(), mmclip_dist.Meta(3, 1, 1, diseases, ()))
    packed = mmclip_dist.JoinedSet(mmclip_dist.Source(url=sets.test))
    samples = {packed.key(0, row): packed.read(0, packed.key(0, row)) for row in range(3)}

    model, words, config, _ = mmclip_dist.load_model(mmclip_dist.resolve_checkpoint(str(tmp_path)))
    size, limit = config.model.image.size, config.model.text.max_tokens
    files = [tmp_path / f"{key}.png" for key in samples]
    for file, members in zip(files, samples.values(), strict=True):
        file.write_bytes(members["png"])
    pixels = np.stack([mmclip_dist.crop_image(decode_image(file), mmclip_dist.WHOLE, size) for file in files])
    reports = [json.loads(members["json"])["report"]["text"] for members in samples.values()]
    tokens = words(reports, truncation=True, max_length=limit, padding=True, return_tensors="pt")
    with torch.no_grad():
        images = model.embed_images(torch.from_numpy(pixels))
        texts = model.embed_texts(tokens["input_ids"], tokens["attention_mask"].bool())

    maker = mmclip_dist.ExampleMaker(words, diseases, size, config.model.image.grid, limit, config.entmlm, augment=None)
    batch = mmclip_dist.collate([maker(key, members, 0) for key, members in samples.items()], 0, words.pad_token_id)
    with torch.no_grad():
        torch.testing.assert_close(images, made.eval().embed_images(batch["image"]), rtol=0, atol=0)
        torch.testing.assert_close(texts, made.embed_texts(batch["tokens"], batch["token_mask"]), rtol=0, atol=0)
    torch.testing.assert_close(images.norm(dim=1), torch.ones(3))
    assert len(images.unique(dim=0)) == len(texts.unique(dim=0)) == 3
