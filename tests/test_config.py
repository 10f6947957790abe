"""The config tree: strict keys, clear messages, checks before anything is built."""

from pathlib import Path

import pytest
import yaml

from mmclip_dist.config import (
    OPERATIONAL,
    Config,
    _known_keys,
    differences,
    dump_config,
    is_operational,
    load_config,
    parse,
    recipe_names,
)  # fmt: skip


@pytest.mark.parametrize("recipe", ["quickstart", "mmclip_vit_b16", "mmclip_vit_l16"])
def test_recipes_load_and_survive_a_round_trip(recipe: str) -> None:
    assert recipe in recipe_names()
    config = load_config(recipe)
    assert parse(yaml.safe_load(dump_config(config))) == config


def test_overrides_are_typed_and_win() -> None:
    config = load_config("quickstart", ["optim.lr=1e-4", "data.sources=[{url: a, weight: 2}]", "optim.stop_at=null"])
    assert config.optim.lr == 1e-4 and config.optim.stop_at is None
    assert config.data.sources[0].url == "a" and config.data.sources[0].weight == 2
    # No field of ours converts what is passed through: YAML 1.1 alone would hand DeepSpeed a text.
    assert load_config("quickstart", ["deepspeed.scheduler.params.warmup_max_lr=1e-4"]).deepspeed == {
        "scheduler": {"params": {"warmup_max_lr": 1e-4}}
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.sources=[{url:sets/a}]", r"unknown config key 'data.sources.0.url:sets/a'; YAML takes a space after a colon"),
        ("model.image.dept=3", r"unknown config key 'model.image.dept'; did you mean model.image.depth"),
        ("modle.image=3", "unknown config key 'modle'"),
        ("optim.steps=0", "optim.steps: .*greater than 0"),
        ("optim.steps=many", "optim.steps: .*integer"),
        ("model.image.heads=5", r"model.image.width=\d+ is no multiple of model.image.heads=5"),
        ("model.image.size=60", r"model.image.size=60 is no multiple of model.image.patch=\d+"),
        (["attmim.mode=split", "attmim.context_keep=0.7"], r"salient_keep \+ attmim.context_keep may not pass 1"),
        (["attmim.mode=context", "attmim.context_keep=0.7"], r"ratio \+ attmim.context_keep may not pass 1"),
        ("attmim={mode: split, salient_keep: 0.7, context_keep: 0.3}", r"round to 18 and 8 of 25 patches.*they may have 25"),
        ("attmim={mode: split, salient_keep: 0.7, context_keep: 0.01}", "round to 18 and 0 of 25 patches: each view needs"),
        (["attmim.mode=feature", "attmim.ratio=0.99"], "attmim.ratio=0.99 rounds to 25 of 25 patches"),
        (["attmim.mode=feature", "attmim.ratio=0.01"], "attmim.ratio=0.01 rounds to 0 of 25 patches"),
        ("run_dir=s3://bucket/run", r"run_dir=s3://bucket/run is a URL.*checkpoint\.url=s3://bucket/run"),
        ("optim.stop_at=10000", "lies after the last step"),
        ("loss={contrastive: 0, image: 0, entity: 0}", "nothing would be trained"),
        ("foo", "form key.sub=value"),
        ("run_dir.x=1", "is a value, not a section"),
        ("data.augment.crop_area=[0.9, 0.2]", "smallest <= largest"),
        ("zero_stage=4", "zero_stage: .*0, 1, 2 or 3"),
        ("offload.parameters=cpu", "needs zero_stage=3, found 1"),
        ("optim={steps: 10, schedule: wsd, warmup: 0.5, decay: 0.6}", "overlap; their sum may not pass 1"),
        ("optim.layer_decay=1.5", "optim.layer_decay"),
        ("optim.name=deepspeed", "go together.*found optim.name=deepspeed without"),
        ("deepspeed={optimizer: {type: Lion}}", "go together.*found optim.name=adamw with"),
    ],
)
def test_faults_are_one_line_that_says_what(override: str | list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        overrides = [override] if isinstance(override, str) else override
        load_config("quickstart", ["model.image={size: 80, patch: 16}", *overrides])  # 25 patches
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["zero_stage=0", "offload.optimizer=cpu"], "needs zero_stage=1 or more"),
        (["zero_stage=0", "precision=fp16"], "loss scale"),
        (["zero_stage=3", "model.compile=true"], "needs zero_stage=2 or less"),
        (["optim.name=deepspeed", "deepspeed={optimizer: {type: Lion}}", "optim.ema=0.99"], "optim.ema needs"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_built(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config("quickstart", overrides)
    load_config("quickstart", ["zero_stage=3", "precision=fp16", "offload={optimizer: cpu, parameters: cpu}", "optim.ema=0.99"])


def test_unknown_recipe_lists_the_known() -> None:
    with pytest.raises(ValueError, match="quickstart"):
        load_config("quickstrat")


def config(**changes: object) -> Config:
    return load_config("quickstart", [f"{key.replace('__', '.')}={value}" for key, value in changes.items()])


def test_streams_must_divide_the_batch_and_any_number_of_ranks_up_to_it_will_do() -> None:
    for world in (1, 2, 3, 31, 63, 64):
        config(data__streams=32, data__workers=4, optim__global_batch=64).check_world(world)
    with pytest.raises(ValueError, match=r"optim\.global_batch=64 samples cannot be spread over 65 ranks: use at most 64"):
        config(data__streams=32, optim__global_batch=64).check_world(65)
    with pytest.raises(ValueError, match="nearest ones are 32 and 64"):
        config(data__streams=32, optim__global_batch=48).check_world(2)


def test_every_rank_makes_the_same_number_of_passes() -> None:
    """Under ZeRO-3 a rank that made one pass less would hang the others."""
    cached = config(data__streams=32, optim__global_batch=64, optim__micro_batch=8)
    cached.check_world(2)
    assert cached.passes(2) == 4 and cached.passes(3) == 3 and config(optim__global_batch=64).passes(3) == 1
    with pytest.raises(ValueError, match=r"optim.micro_batch=12 does not divide a rank's share of the batch, 64 / 2 = 32"):
        config(data__streams=32, optim__global_batch=64, optim__micro_batch=12).check_world(2)
    with pytest.raises(ValueError, match="needs 2 passes, but some of the 63 ranks have 1 samples"):
        config(data__streams=32, optim__global_batch=64, optim__micro_batch=1).check_world(63)


def test_sidecars_that_the_losses_need() -> None:
    with pytest.raises(ValueError, match="mmclip entities"):
        config(data__sources="[{url: a}]", model__text__tokenizer="t").check_sources()
    config(data__sources="[{url: a}]", model__text__tokenizer="t", loss__entity=0).check_sources()
    with pytest.raises(ValueError, match="mmclip attention"):
        config(
            data__sources="[{url: a}]", model__text__tokenizer="t", loss__entity=0, attmim__mode="split"
        ).check_sources()
    with pytest.raises(ValueError, match="train one with `mmclip tokenizer"):
        config(data__sources="[{url: a}]", loss__entity=0).check_sources()
    config(data__sources="[{url: a}]", model__text__pretrained="b", loss__entity=0).check_sources()
    with pytest.raises(ValueError, match=r"data\.sources is empty"):
        config().check_sources()


def test_shares_that_just_fit_are_taken() -> None:
    shares = "attmim={mode: split, salient_keep: 0.7, context_keep: 0.28}"
    config = load_config("quickstart", ["model.image={size: 80, patch: 16}", shares])
    assert config.attmim.views(25) == (18, 7)


def test_every_operational_key_exists() -> None:
    """A key that was renamed and not here would be refused at resume."""
    assert set(_known_keys(Config)) >= OPERATIONAL


def test_differences_are_whole_dotted_names() -> None:
    changes = [
        "optim.lr=0.5", "optim.micro_batch=2", "data.reading.connections=3", "data.sources=[{url: a}]", "deepspeed={a: {b: 1}}"
    ]  # fmt: skip
    found = differences(load_config("quickstart"), load_config("quickstart", changes))
    assert set(found) == {"optim.lr", "optim.micro_batch", "data.reading.connections", "data.sources", "deepspeed.a.b"}
    assert found["optim.micro_batch"] == (None, 2)
    assert {key for key in found if is_operational(key)} == {"optim.micro_batch", "data.reading.connections"}


@pytest.mark.parametrize(("content", "told"), [(b"\xff\xfeoptim", "is not UTF-8 text"), (b"optim: {steps", "is not valid YAML")])
def test_a_spoiled_recipe_is_named(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} {told}"):
        load_config(str(path))


@pytest.mark.parametrize(
    "override",
    ["track.mlflow=http://user:hunter2@there:5000", "track.mlflow=https://hunter2@there", "checkpoint.url=s3://id:hunter2@bucket/run",
     "data.sources=[{url: 'http://me:hun@ter2@there/train'}]", "deepspeed.monitor.url=https://hunter2@there",
     "track.mlflow=postgresql://me:hunter2@there/db", "track.mlflow=http://me:hunter2@there: {",
     "checkpoint.url=s3://id:hun/ter2@bucket/run", "data.sources=[{url: 'https://b/train?X-Amz-Signature=hunter2'}]"],
)  # fmt: skip
def test_a_password_in_a_url_is_refused_and_not_repeated(override: str) -> None:
    with pytest.raises(ValueError) as told:
        load_config("quickstart", [override])
    assert "hun" not in str(told.value)
    assert "leave it out, and give it in a file" in str(told.value) or "not valid YAML" in str(told.value)


def test_an_account_in_a_url_is_no_password() -> None:
    url = "abfs://container@account.dfs.core.windows.net/run"
    assert load_config("quickstart", [f"checkpoint.url={url}"]).checkpoint.url == url


@pytest.mark.parametrize("folder", ["''", "' '", '"a\\nb"'])
def test_a_run_folder_without_a_name_is_refused(folder: str) -> None:
    """An empty one would be the working folder."""
    with pytest.raises(ValueError, match=r"run_dir=.* is no name of a folder"):
        load_config("quickstart", [f"run_dir={folder}"])


def test_disks_of_the_hosts_own_need_a_store() -> None:
    with pytest.raises(ValueError, match=r"host_local=true needs checkpoint\.url: .*=s3://BUCKET/RUN"):
        load_config("quickstart", ["checkpoint.host_local=true"])
