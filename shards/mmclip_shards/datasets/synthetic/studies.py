"""Sample synthetic chest studies: a patient's anatomy, how the film was taken, the findings and the devices.

`drawing` draws a `Study` and `reports` describes the same one, so the text is true to the image.

Anatomy coordinates: x from -1 (the patient's right, image left) to 1 (the patient's left, image right), y from -1 (neck) to
1 (abdomen). One unit is about 17 cm.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Literal, TypeVar

import numpy as np

FINDINGS = ("Atelectasis", "Cardiomegaly", "Consolidation", "Nodule", "Pleural Effusion", "Pneumothorax")

Option = TypeVar("Option")
Side = Literal["right", "left", "bilateral", "none"]
Severity = Literal["mild", "moderate", "severe"]
Zone = Literal["upper", "mid", "lower", "retrocardiac", "none"]
Kind = Literal["linear", "volume loss", "plain"]
Device = Literal["electrodes", "port", "tracheal tube", "pacemaker"]

SIDES: tuple[Side, Side] = ("right", "left")
SEVERITIES: tuple[Severity, ...] = ("mild", "moderate", "severe")
ZONES: tuple[Zone, ...] = ("upper", "mid", "lower")

FINDING_COUNT_ODDS = (0.25, 0.24, 0.27, 0.24)
"""Chances of 0, 1, 2 and 3 findings in one study: a quarter is normal."""
FINDING_ODDS = (0.18, 0.18, 0.18, 0.18, 0.18, 0.10)
SEVERITY_ODDS = (0.25, 0.45, 0.30)
PLACING_ORDER = ("Cardiomegaly", "Pneumothorax", "Pleural Effusion", "Consolidation", "Atelectasis", "Nodule")
"""Findings that have only one possible place choose first. The focal lesions share the zones that are left."""

STUDIES_PER_PATIENT = ((1, 2, 3), (1, 3, 2), (2, 1, 3), (2, 3, 1), (3, 1, 2), (3, 2, 1))
"""How three patients can share a block of six consecutive indices. So the index alone determines the patient."""
BLOCK = 6


@dataclass(frozen=True)
class Finding:
    """One abnormality. Its exact place and shape depend on its own `seed`, so removing another finding does not move it."""

    name: str
    severity: Severity
    side: Side = "none"
    zone: Zone = "none"
    kind: Kind = "plain"
    seed: int = 0


@dataclass(frozen=True)
class Anatomy:
    """A patient's anatomy, the same in all his or her studies. In anatomy units (see the module)."""

    lung_width: float
    lung_height: float
    heart_ratio: float
    heart_height: float
    heart_tilt: float
    heart_centre: float
    mediastinum: float
    aortic_knob: float
    rib_spacing: float
    rib_phase: float
    rib_contrast: float
    wall: float
    breast: float
    dome_step: float
    spine_bend: float
    vessel_tree: float


ANATOMY_RANGES: dict[str, tuple[float, float]] = {
    "lung_width": (0.335, 0.405),
    "lung_height": (0.86, 1.0),
    "heart_ratio": (0.40, 0.485),
    "heart_height": (0.25, 0.31),
    "heart_tilt": (0.25, 0.75),
    "heart_centre": (0.07, 0.13),
    "mediastinum": (0.10, 0.16),
    "aortic_knob": (0.05, 0.10),
    "rib_spacing": (0.155, 0.185),
    "rib_phase": (0.0, 1.0),
    "rib_contrast": (0.05, 0.13),
    "wall": (0.08, 0.22),
    "breast": (-0.10, 0.12),
    "dome_step": (0.02, 0.09),
    "spine_bend": (-0.04, 0.04),
    "vessel_tree": (0.0, 1.0),
}


@dataclass(frozen=True)
class Pose:
    """How one film was taken: position on the detector, breath and exposure."""

    rotation: float
    scale: float
    shift_x: float
    shift_y: float
    oblique: float
    inspiration: float
    gamma: float
    gain: float
    offset: float
    noise: float


POSE_RANGES: dict[str, tuple[float, float]] = {
    "rotation": (-0.09, 0.09),
    "scale": (0.92, 1.10),
    "shift_x": (-0.09, 0.09),
    "shift_y": (-0.07, 0.07),
    "oblique": (-0.035, 0.035),
    "inspiration": (-0.10, 0.06),
    "gamma": (0.75, 1.30),
    "gain": (0.86, 1.08),
    "offset": (-0.03, 0.07),
    "noise": (0.012, 0.035),
}


@dataclass(frozen=True)
class Study:
    """All facts that are drawn and described for one image. visit: counts the patient's studies, from 0."""

    patient: str
    visit: int
    view: Literal["PA", "AP"]
    anatomy: Anatomy
    pose: Pose
    findings: tuple[Finding, ...]
    devices: tuple[Device, ...]
    noise_seed: int


def patient_of(index: int, *, seed: int, unpaired: bool) -> tuple[int, int]:
    """The numbers of patient and visit (0 to 2) of study `index`. Three patients share every six indices."""
    block, place = divmod(index, BLOCK)
    for slot, studies in enumerate(_studies_of_block(block, seed, unpaired)):
        if place < studies:
            return 3 * block + slot, place
        place -= studies
    raise AssertionError("a block holds six studies")


@lru_cache(maxsize=8)
def _studies_of_block(block: int, seed: int, unpaired: bool) -> tuple[int, ...]:
    rng = np.random.default_rng((seed, int(unpaired), 1, block))
    return STUDIES_PER_PATIENT[int(rng.integers(len(STUDIES_PER_PATIENT)))]


def sample_study(index: int, *, seed: int, unpaired: bool) -> Study:
    """Study `index`: a pure function of (index, seed, unpaired)."""
    patient, visit = patient_of(index, seed=seed, unpaired=unpaired)
    rng = np.random.default_rng((seed, int(unpaired), 2, index))
    view: Literal["PA", "AP"] = "AP" if rng.random() < 0.3 else "PA"
    return Study(
        patient=f"synthetic-{'unpaired-' if unpaired else ''}patient-{patient:06d}",
        visit=visit,
        view=view,
        anatomy=sample_anatomy(patient, seed=seed, unpaired=unpaired),
        pose=Pose(**_uniform(rng, POSE_RANGES)),
        findings=sample_findings(rng),
        devices=_sample_devices(rng, view),
        noise_seed=int(rng.integers(2**31)),
    )


@lru_cache(maxsize=8)
def sample_anatomy(patient: int, *, seed: int, unpaired: bool) -> Anatomy:
    """A patient's anatomy: a pure function of (patient, seed, unpaired). Cached, because a patient's studies are neighbours."""
    return Anatomy(**_uniform(np.random.default_rng((seed, int(unpaired), 3, patient)), ANATOMY_RANGES))


def sample_findings(rng: np.random.Generator) -> tuple[Finding, ...]:
    """0 to 3 different findings, in the order of FINDINGS. No two share a lung zone, so none hides another."""
    count = _pick(range(len(FINDING_COUNT_ODDS)), FINDING_COUNT_ODDS, rng)
    names = {FINDINGS[i] for i in rng.choice(len(FINDINGS), size=count, replace=False, p=FINDING_ODDS)}
    free: set[tuple[Side, Zone]] = {(side, zone) for side in SIDES for zone in ZONES}
    chosen = [_place(name, free, rng) for name in PLACING_ORDER if name in names]
    return tuple(sorted(chosen, key=lambda finding: finding.name))


def _place(name: str, free: set[tuple[Side, Zone]], rng: np.random.Generator) -> Finding:
    """One finding with severity, side and zone. Removes the zones that it fills from `free`."""
    severity = _pick(SEVERITIES, SEVERITY_ODDS, rng)
    finding_seed = int(rng.integers(2**31))
    side: Side = SIDES[int(rng.integers(2))]
    zone: Zone = "none"
    kind: Kind = "plain"
    if name == "Cardiomegaly":
        # A large heart would hide a finding in the left lower zone.
        free.discard(("left", "lower"))
        return Finding(name, severity, seed=finding_seed)
    if name == "Pneumothorax":
        zone = "upper"
    elif name == "Pleural Effusion":
        zone = "lower"
        side = "bilateral" if rng.random() < 0.3 else side
    else:
        places = sorted(free)
        side, zone = places[int(rng.integers(len(places)))]
    if name == "Atelectasis":
        kind = "volume loss" if zone == "lower" and rng.random() < 0.6 else "linear"
    filled = SIDES if side == "bilateral" else (side,)
    # A severe effusion or pneumothorax reaches the middle of the lung.
    reach: tuple[Zone, ...] = (zone, "mid") if severity == "severe" and name.startswith("P") else (zone,)
    free.difference_update((s, z) for s in filled for z in reach)
    if name == "Consolidation" and (side, zone) == ("left", "lower") and rng.random() < 0.4:
        zone = "retrocardiac"
    return Finding(name, severity, side, zone, kind, finding_seed)


def _pick(options: Sequence[Option], odds: Sequence[float], rng: np.random.Generator) -> Option:
    """Draw one option by its odds, which sum to 1. `Generator.choice` takes ten times as long."""
    return options[min(bisect(list(accumulate(odds)), rng.random()), len(options) - 1)]


def _sample_devices(rng: np.random.Generator, view: str) -> tuple[Device, ...]:
    """Draw devices. They do not depend on the findings (no shortcut for a model), and are more common on portable (AP) films."""
    odds: dict[Device, float] = {"electrodes": 0.18, "port": 0.08, "tracheal tube": 0.05, "pacemaker": 0.06}
    more = 1.8 if view == "AP" else 0.7
    return tuple(device for device, chance in odds.items() if rng.random() < chance * more)


def _uniform(rng: np.random.Generator, ranges: dict[str, tuple[float, float]]) -> dict[str, float]:
    """One uniform draw for each named range."""
    draws = rng.random(len(ranges)).tolist()
    return {name: low + (high - low) * u for (name, (low, high)), u in zip(ranges.items(), draws, strict=True)}
