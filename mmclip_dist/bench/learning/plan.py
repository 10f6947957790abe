"""A plan of runs: the data, the arms and the seeds, from a YAML file that is committed beside its results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from mmclip_shards.textfiles import read_text
from pydantic import Field, ValidationError, model_validator

from mmclip_dist.config import Section, one_line


class Drawn(Section):
    """Synthetic radiographs. Each seed of the plan draws training sets of its own; held-out patients are the same for all."""

    pairs: int = Field(gt=0)  # training images with a report
    unpaired: int = Field(0, ge=0)  # further training images without one
    labels: bool = True  # whether those have labels
    probe: int = Field(4000, ge=100)  # labelled images for the linear probe, of other patients
    validation: int = Field(1500, gt=0)
    test: int = Field(3000, gt=0)
    size: int = Field(72, ge=32)  # pixels
    draw: int = Field(ge=0)  # the test bed: another number draws other patients, for tuning and for the last word


class Packed(Section):
    """Packed sets: URLs of splits. One patient is in one of them only."""

    pairs: str
    unpaired: str | None = None
    probe: str
    validation: str
    test: str


class Arm(Section):
    """One way to train. unpaired: share of a batch that comes from the unpaired images; 0: pairs alone."""

    overrides: tuple[str, ...] = ()
    unpaired: float = Field(0.0, ge=0, lt=1)
    attention: str | None = None  # the arm whose checkpoint of the same seed scores the patches beforehand


class Plan(Section):
    """steps: of every arm in the comparison of equal steps. In that of equal time an arm makes as many as the control's processor
    time allows."""

    recipe: str = "quickstart"
    overrides: tuple[str, ...] = ()  # of every arm, before its own
    data: Drawn | Packed
    steps: int = Field(gt=0)
    evaluations: int = Field(8, gt=0)  # on the validation patients; the best checkpoint is measured
    seeds: tuple[int, ...] = Field(min_length=1)
    compare: tuple[Literal["steps", "time"], ...] = Field(("steps", "time"), min_length=1)
    control: str
    arms: dict[Annotated[str, Field(pattern=r"^[a-z0-9-]+$")], Arm]

    @model_validator(mode="after")
    def _names(self) -> Self:
        named = {"control": self.control} | {f"arms.{name}.attention": arm.attention for name, arm in self.arms.items()}
        for key, name in named.items():
            if name is not None and name not in self.arms:
                raise ValueError(f"{key}={name} is no arm; the arms are {', '.join(self.arms)}")
        for name, arm in self.arms.items():
            if arm.attention is not None and self.arms[arm.attention].attention is not None:
                raise ValueError(f"arms.{name}.attention={arm.attention} needs scores itself: name an arm that needs none")
            if arm.unpaired and not self.has_unpaired:
                raise ValueError(f"arms.{name}.unpaired={arm.unpaired}, but the data has no unpaired images")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)} names one twice")
        return self

    @property
    def has_unpaired(self) -> bool:
        return bool(self.data.unpaired)


def load_plan(path: Path) -> Plan:
    """ValueError in one line for a file that is no plan."""
    try:
        return Plan.model_validate(yaml.safe_load(read_text(path, "save it as UTF-8")))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        raise ValueError(f"{path}: {one_line(error)}") from error
