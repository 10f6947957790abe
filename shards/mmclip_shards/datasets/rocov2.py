from __future__ import annotations

from collections.abc import Iterator

from mmclip_shards.datasets.prepared import key_of, split_name
from mmclip_shards.datasets.recipe import recipe
from mmclip_shards.datasets.upstream import find_file, read_csv
from mmclip_shards.rawpath import RawPath
from mmclip_shards.schema import Record


@recipe(
    licence="that of each figure, CC BY or CC BY-NC: license_information.csv",
    access="free download",
    source="https://zenodo.org/records/10821435",
    official=True,
)
def rocov2(raw: RawPath) -> Iterator[Record]:
    """ROCOv2: radiological figures of PubMed Central with captions, all modalities.

    RAW holds {train,valid,test}_captions.csv and train/, valid/ and test/ (JPEG).

    Quirks: the tables' columns are ID and Caption; `valid` is `val`; concepts (UMLS codes) are no labels of ours and are not
    read. A figure counts as a patient. All of this is remembered or read in other programs, not in the files; the set has
    79,789 images.
    """
    for upstream in ("train", "valid", "test"):
        for row in read_csv(find_file(raw, f"{upstream}_captions.csv"), "ID", "Caption"):
            source = f"{upstream}/{row['ID']}.jpg"
            yield Record(
                key=key_of(source), image=raw / source, patient=row["ID"], source=source, report=row["Caption"],
                split=split_name(upstream),
            )  # fmt: skip
