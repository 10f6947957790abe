"""`mmclip plan`: a run on paper, before any machine is rented."""

from __future__ import annotations

from typing import Annotated

import typer

from mmclip_dist.commands.options import Overrides, RecipeName


def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    gpus: Annotated[list[int], typer.Option(min=1, help="GPUs; given several times: one row for each.")] = [8],  # noqa: B006
    gpu: Annotated[str, typer.Option(help="Card: h100, h200, a100-80, ... (an unknown name lists all).")] = "h100",
    per_node: Annotated[int | None, typer.Option(min=1, help="GPUs of a node; by default the card's usual.")] = None,
    per_gpu: Annotated[
        int | None, typer.Option(min=1, help="Samples of each GPU in a step: sets optim.global_batch and data.streams.")
    ] = None,
    mfu: Annotated[float | None, typer.Option(help="Reached share of the peak FLOP/s; by default as published.")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Price of one GPU for one hour.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Samples of the data set; shows the epochs.")] = None,
    tokens: Annotated[float, typer.Option(min=1, help="Tokens of a report: the mean, or the padded length.")] = 45,
    masked: Annotated[float, typer.Option(min=0, help="Tokens of a report that EntMLM masks.")] = 10,
    paired: Annotated[float, typer.Option(min=0, max=1, help="Share of the samples that have a report.")] = 1,
    diseases: Annotated[int, typer.Option(min=0, help="Diseases with a prompt, if the recipe names none.")] = 14,
    vocabulary: Annotated[int, typer.Option(min=1, help="Size of the tokenizer's vocabulary.")] = 28_996,
    sample_bytes: Annotated[float, typer.Option(min=1, help="Size of one stored sample.")] = 64e3,
) -> None:
    """Memory, speed, days and cost of a run on paper, and which ZeRO stage and micro batch fit."""
    from mmclip_dist.config import load_config
    from mmclip_dist.plan.cards import card_named
    from mmclip_dist.plan.layouts import largest, layouts, recommend
    from mmclip_dist.plan.layouts import plan as plan_of
    from mmclip_dist.plan.report import describe_plan, describe_scaling
    from mmclip_dist.plan.setup import Corpus, configured, setup_of

    card, found = card_named(gpu), []
    for count in gpus:
        spread = [f"optim.global_batch={per_gpu * count}", f"data.streams={per_gpu * count}"] if per_gpu else []
        config = load_config(recipe, [*(overrides or []), *spread])
        corpus = Corpus(
            tokens=min(tokens, config.model.text.max_tokens), masked=masked, paired=paired, vocabulary=vocabulary,
            diseases=len(config.prompts.diseases) or diseases, sample_bytes=sample_bytes, samples=samples,
        )  # fmt: skip
        setup = setup_of(config, card, count, corpus=corpus, per_node=per_node, mfu=mfu)
        candidates = [largest(setup, layout) for layout in layouts()]
        best = recommend(candidates)
        if len(gpus) == 1:
            asked = plan_of(setup, configured(config, count))
            print(describe_plan(best, asked, candidates, name=recipe, price=price))
        found.append(best)
    if len(gpus) > 1:
        print(describe_scaling(found, price=price))
