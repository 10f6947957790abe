"""The cards' peak rates, as data. Vendors publish peaks; `Card.mfu` is the share of the peak that a run reaches."""

from __future__ import annotations

from dataclasses import dataclass

GIGA, TERA, MIB = 1e9, 1e12, 2**20


@dataclass(frozen=True)
class Card:
    """One GPU in the node that it is usually sold in. Rates are per second; bandwidths one way."""

    name: str  # of the command line
    product: str  # how the driver's name of the device begins
    flops: float  # dense bf16 with fp32 accumulation, without sparsity
    flops_fp32: float  # exact float32, on the ordinary cores
    memory: float  # bytes, as the driver reports them
    hbm: float  # bytes/s
    nvlink: float  # bytes/s that one card sends to the others of its node
    network: float  # bytes/s that one node sends to the others
    per_node: int
    mfu: float  # model FLOP/s over `flops` that published contrastive training reaches in one node
    mfu_source: str


# NVIDIA CLIP in NeMo, g/14 (user guide, "performance" of CLIP): 559 samples/s on 8 x A100-80 and 935 on 8 x H100, at
# 1.74 TFLOP a sample (three times the 581 GFLOP of the forward pass), which is 0.39 and 0.21 of the dense bf16 peak.
# LAION open-clap-scaling reports 0.210 and 0.212 for two audio-text models on one node of 4 x GH200.
_NEMO_A100 = "NeMo CLIP g/14 on one DGX A100: 559 samples/s"
_NEMO_H100 = "NeMo CLIP g/14 on one DGX H100: 935 samples/s"
_LAION_GH200 = "LAION CLAP on one node of 4 GH200: 21.0% and 21.2%"

# Peaks, HBM and NVLink: NVIDIA's data sheets of A100, H100, H200, GH200 and HGX B200; tensor-core figures halved where the
# sheet states them with sparsity, NVLink halved because it states both directions. Memory: the total of `nvidia-smi`.
# Network: DGX A100 8 x 200 Gb/s (HDR), DGX H100, H200 and B200 8 x 400 Gb/s (NDR), JUPITER Booster 4 x 200 Gb/s (NDR200).
CARDS = (
    Card("a100-40", "NVIDIA A100-SXM4-40GB", 312 * TERA, 19.5 * TERA, 40_960 * MIB, 1_555 * GIGA, 300 * GIGA, 200 * GIGA,
         8, 0.39, _NEMO_A100),
    Card("a100-80", "NVIDIA A100-SXM4-80GB", 312 * TERA, 19.5 * TERA, 81_920 * MIB, 2_039 * GIGA, 300 * GIGA, 200 * GIGA,
         8, 0.39, _NEMO_A100),
    Card("h100", "NVIDIA H100 80GB HBM3", 989 * TERA, 67 * TERA, 81_559 * MIB, 3_350 * GIGA, 450 * GIGA, 400 * GIGA,
         8, 0.21, _NEMO_H100),
    Card("h200", "NVIDIA H200", 989 * TERA, 67 * TERA, 143_771 * MIB, 4_800 * GIGA, 450 * GIGA, 400 * GIGA,
         8, 0.21, f"no published figure; that of the H100: {_NEMO_H100}"),
    Card("gh200", "NVIDIA GH200", 989 * TERA, 67 * TERA, 97_871 * MIB, 4_000 * GIGA, 450 * GIGA, 100 * GIGA,
         4, 0.21, _LAION_GH200),
    # HBM of the B200: 7,680 bits x 3,996 MHz x 2 as the driver reports (pytorch/ao pull request 4002); the sheet: up to 8 TB/s.
    Card("b200", "NVIDIA B200", 2_250 * TERA, 75 * TERA, 183_359 * MIB, 7_672 * GIGA, 900 * GIGA, 400 * GIGA,
         8, 0.21, f"no published figure; that of the H100: {_NEMO_H100}"),
)  # fmt: skip


def card_named(name: str) -> Card:
    """The card of the command line; ValueError with the known names."""
    for card in CARDS:
        if card.name == name.lower():
            return card
    raise ValueError(f"no card {name!r} in the table; the known ones are {', '.join(card.name for card in CARDS)}")


def card_of_device(device_name: str) -> Card | None:
    """The card behind a driver's device name, such as "NVIDIA H100 80GB HBM3"; None for one that is not in the table.

    PCIe and NVL boards have other peaks than the SXM board of the same name, so they do not match it.
    """
    other = ("PCIe", "NVL", "GB200")
    if any(word in device_name for word in other):
        return None
    return next((card for card in CARDS if device_name.startswith(card.product)), None)
