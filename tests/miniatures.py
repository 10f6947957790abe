"""Miniatures of published trees, one for each recipe: a few rows of each table, with the traps that the real files set.
`call` packs."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest
from mmclip_shards.datasets.chexpert import FINDINGS
from PIL import Image

from mmclip_dist import cli


def write(raw: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = raw / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = text.encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return raw


def images(raw: Path, names: Iterable[str], pixels: np.ndarray | None = None) -> None:
    for name in names:
        path = raw / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) if pixels is None else pixels).save(path)



def folder(raw: Path) -> Path:
    images(raw, ["train/NORMAL/a.1.png", "train/PNEUMONIA/a.2.png", "test/PNEUMONIA/b.JPG", "test/PNEUMONIA/c.png"])
    write(raw, {"train/PNEUMONIA/a.2.txt": "Opacity.", "test/Thumbs.db": "", "test/README": ""})
    return raw



def jsonl(raw: Path) -> Path:
    rows = [
        {"image": "i/a.png", "patient": "1", "report": "Clear.", "labels": {"Edema": 1, "Mass": None}, "view": "PA"},
        {"image": "i/b.png", "patient": "2", "sections": {"impression": "Edema."}, "split": "valid", "key": "b",
         "boxes": [{"label": "Mass", "x": 1, "y": 2, "width": 3, "height": 4}]},
    ]  # fmt: skip
    return write(raw, {"a.jsonl": "\n".join(map(json.dumps, rows)) + "\n\n"})



def embedded_png() -> bytes:
    """The image that the Parquet miniature holds in its table."""
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(raw: Path) -> Path:
    """Needs pyarrow."""
    import pyarrow.parquet

    images = [{"bytes": embedded_png(), "path": "/home/me/a.png"}, {"bytes": None, "path": "i/b.png"}]
    table = pyarrow.table({"image": images, "patient": ["1", "2"], "report": ["Clear.", None]})
    pyarrow.parquet.write_table(table, raw / "part.parquet")
    return raw


NIH_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)



def nih(raw: Path) -> Path:
    """Rows of the real tables."""
    names = ["00000001_000.png", "00000001_001.png", "00000002_000.png", "00013118_008.png"]
    images(raw, [f"images_001/images/{name}" for name in names[:2]] + [f"images_002/images/{name}" for name in names[2:]])
    return write(
        raw,
        {
            "Data_Entry_2017_v2020.csv": f"{NIH_HEADER}\n"
            "00000001_000.png,Cardiomegaly,0,1,57,M,PA,2682,2749,0.143,0.143\n"
            "00000001_001.png,Cardiomegaly|Emphysema,1,1,58,M,PA,2894,2729,0.143,0.143\n"
            "00000002_000.png,No Finding,0,2,80,M,AP,2500,2048,0.171,0.171\n"
            "00013118_008.png,Infiltration|Pleural_Thickening,8,13118,69,M,PA,2778,2678,0.143,0.143\n",
            "BBox_List_2017.csv": "Image Index,Finding Label,Bbox [x,y,w,h],,,\n"
            "00013118_008.png,Atelectasis,225.084745762712,547.019216763771,86.7796610169491,79.1864406779661\n"
            "00013118_008.png,Infiltrate,1,2,3,4\n",
            "train_val_list.txt": "00000001_000.png\n00000001_001.png\n",
            "test_list.txt": "00000002_000.png\n00013118_008.png",
            "splits/mrm/train_list.txt": "00000001_000.png 0 0 0 1\n00000001_001.png 0 0 0 1\n",
            "splits/mrm/val_list.txt": "00000002_000.png 0 0 0 1\n",
            "splits/mrm/test_list.txt": "00013118_008.png 0 0 0 1\n",
        },
    )



def openi_xml(texts: Mapping[str, str], major: Iterable[str], parents: Iterable[str]) -> str:
    abstract = "".join(f'<AbstractText Label="{label}">{text}</AbstractText>' for label, text in texts.items())
    headings = "".join(f"<major>{name}</major>" for name in major)
    return (
        f"<eCitation><MedlineCitation><Article><Abstract>{abstract}</Abstract></Article></MedlineCitation>"
        f"<MeSH>{headings}<automatic>edema</automatic></MeSH>"
        + "".join(f'<parentImage id="{name}"><caption>Xray Chest PA and Lateral</caption></parentImage>' for name in parents)
        + "</eCitation>"
    )



def openi(raw: Path) -> Path:
    files = {
        "1": openi_xml(
            {"COMPARISON": "None.", "INDICATION": "Positive TB test", "FINDINGS": "There are no XXXX of\n an  effusion.",
             "IMPRESSION": "Normal chest x-XXXX."},
            ["normal"], ["CXR1_1_IM-0001-3001", "CXR1_1_IM-0001-4001"],
        ),
        "10": openi_xml({"FINDINGS": "", "IMPRESSION": "Mass."}, ["Mass/breast/left", "Breast Mass/x"], ["CXR10_IM-0002-1001"]),
        "2": openi_xml({"IMPRESSION": "x"}, ["normal"], []),
        "3": "<eCitation>",
    }  # fmt: skip
    write(raw, {f"ecgen-radiology/{name}.xml": text for name, text in files.items()})
    images(raw, ["NLMCXR_png/CXR1_1_IM-0001-3001.png", "CXR10_IM-0002-1001.png"])
    return raw


CHEXPERT_HEADER = "Path,Sex,Age,Frontal/Lateral,AP/PA," + ",".join(FINDINGS)



def chexpert_row(path: str, view: str, cells: str) -> str:
    return f"{path},Female,68,{view},{cells}\n"



def chexpert(raw: Path) -> Path:
    """The first rows are real."""
    rows = [
        chexpert_row("CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg", "Frontal,AP", "1.0,,,,,,,,,0.0,,,,1.0"),
        chexpert_row("CheXpert-v1.0-small/train/patient00002/study2/view1_frontal.jpg", "Frontal,AP",
                     ",,-1.0,1.0,,-1.0,-1.0,,-1.0,,-1.0,,1.0,"),
        chexpert_row("CheXpert-v1.0-small/train/patient00002/study1/view2_lateral.jpg", "Lateral,", ",,,,,,,,,,,,,"),
    ]  # fmt: skip
    valid = chexpert_row("CheXpert-v1.0-small/valid/patient64541/study1/view1_frontal.jpg", "Frontal,PA", "0.0," * 13 + "1.0")
    tests = [f"test/patient64741/study1/{name}.jpg" for name in ("view1_frontal", "view2_lateral")]
    images(raw, tests)
    truth = "Study," + ",".join(FINDINGS) + "\nCheXpert-v1.0/test/patient64741/study1," + "0.0," * 13 + "1.0\n"
    return write(raw, {"train.csv": "\n".join([CHEXPERT_HEADER, *map(str.strip, rows)]),
                            "valid.csv": f"{CHEXPERT_HEADER}\n{valid}", "groundtruth.csv": truth})  # fmt: skip



def chexpert_plus(raw: Path) -> Path:
    columns = [
        "path_to_image", "path_to_dcm", "frontal_lateral", "ap_pa", "deid_patient_id", "section_findings", "section_impression",
        "section_clinical_history", "section_comparison", "section_technique", "split",
    ]  # fmt: skip
    rows = [
        'train/patient42142/study5/view1_frontal.jpg,x,Frontal,AP,p,,"1. Edema.\n2. No\npneumothorax.",Pain,None,,train',
        "train/patient42142/study5/view2_lateral.jpg,x,Lateral,,p,Clear,Normal,,,,train",
        "valid/patient64541/study1/view1_frontal.jpg,x,Frontal,PA,q,,Normal,,,,valid",
    ]
    labels = dict.fromkeys(FINDINGS) | {"Edema": 1, "Pneumothorax": 0, "path_to_image": rows[0].split(",")[0]}
    write(raw, {"df_chexpert_plus_240401.csv": "\n".join([",".join(columns), *rows]),
                     "report_fixed.json": json.dumps(labels) + "\n"})  # fmt: skip
    images(raw, ["PNG/train/patient42142/study5/view1_frontal.png", "PNG/train/patient42142/study5/view2_lateral.png"])
    return raw



def brax(raw: Path) -> Path:
    header = "DicomPath,PngPath,PatientID,PatientSex,PatientAge,AccessionNumber,StudyDate," + ",".join(FINDINGS)
    row = "d,images/id_77/Study_1.2.3/Series_4.5/image-6.7.png,77,F,40,9,20200101," + "," * 5 + "1,-1,0" + "," * 7
    return write(raw, {"master_spreadsheet_update.csv": f"{header},ViewPosition,Rows,Columns,Manufacturer\n{row}L,10,10,x\n"})


REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___ year old woman with ?pleural effusion

 COMPARISON:  ___

\x20FINDINGS:\x20

\x20Cardiac size cannot be evaluated.  Large left pleural effusion is new.

 IMPRESSION:\x20

 Large left pleural effusion

 NOTIFICATION:  Discussed with ___.
"""
ADDENDUM = """ ADDENDUM: the effusion is on the right.
 ______________________________________________________________________________
"""
FACTS = [  # subject, study, image, view, code, split, the study's label of edema, report
    ("10000032", "50414267", "02aa804e-bde0afdd-112c0b34-7bc16630-4e384014", "PA", "", "train", "1.0", REPORT),
    ("10000032", "50414267", "174413ec-4ec4c1f7-34ea26b7-c5f994f8-79ef1962", "LATERAL", "", "train", "1.0", REPORT),
    ("10000032", "53189527", "2a2277a9-b0ded155-c0de8eb9-c124d10e-82c5caab", "", "antero-posterior", "train", "-1.0",
     ADDENDUM + REPORT),
    ("11000011", "51029426", "71a3a9ae-b4f1ae1c-2d7ad5f1-0bd9a4a1-3e5f8a1b", "AP", "", "validate", "0.0",
     "                                 FINAL REPORT\n FINDINGS AND IMPRESSION: No change."),
    ("19999987", "55368167", "a1b2c3d4-a1b2c3d4-a1b2c3d4-a1b2c3d4-a1b2c3d4", "AP", "", "test", "",
     "                                 WET READ\n\n Frontal view.\n \n The heart is large."),
    ("19999987", "58621812", "b1b2c3d4-a1b2c3d4-a1b2c3d4-a1b2c3d4-a1b2c3d4", "", "", "test", None, None),
]  # fmt: skip



def mimic(raw: Path) -> Path:
    files = {
        "mimic-cxr-2.0.0-metadata.csv.gz": "dicom_id,subject_id,study_id,ViewPosition,Rows,ViewCodeSequence_CodeMeaning\n",
        "mimic-cxr-2.0.0-split.csv.gz": "dicom_id,study_id,subject_id,split\n",
        "mimic-cxr-2.0.0-chexpert.csv.gz": f"subject_id,study_id,{','.join(sorted(FINDINGS))}\n",
        "cxr-record-list.csv.gz": "subject_id,study_id,dicom_id,path\n",
    }
    labelled = set()
    for subject, study, name, view, code, split, edema, report in FACTS:
        files["mimic-cxr-2.0.0-metadata.csv.gz"] += f"{name},{subject},{study},{view},10,{code}\n"
        files["mimic-cxr-2.0.0-split.csv.gz"] += f"{name},{study},{subject},{split}\n"
        files["cxr-record-list.csv.gz"] += f"{subject},{study},{name},files/p{subject[:2]}/p{subject}/s{study}/{name}.dcm\n"
        if edema is not None and study not in labelled:
            labelled.add(study)
            cells = ",".join(edema if finding == "Edema" else "" for finding in sorted(FINDINGS))
            files["mimic-cxr-2.0.0-chexpert.csv.gz"] += f"{subject},{study},{cells}\n"
        if report is not None:
            files[f"mimic-cxr-reports/files/p{subject[:2]}/p{subject}/s{study}.txt"] = report
        images(raw, [f"files/p{subject[:2]}/p{subject}/s{study}/{name}.jpg"])
    return write(raw, files)



def padchest(raw: Path) -> Path:
    rows = [
        "0,1_a.png,0,839,PA, sin hallazg patolog .,['normal'],\"['C0034069' 'C0742362']\"",
        "1,2_b.png,0,840,L,masa .,\"['mass', ' pneumonia', '', 'unchanged']\",",
        "2,3_c.png,54,841,AP_horizontal,,\"['breast mass']\",",
        "3,4_d.png,54,842,UNK,x,nan,",
        "4,5_e.png,54,843,PA,x,\"['suboptimal study', 'mass']\",",
        "5,6_f.png,54,844,EXCLUDE,x,['normal'],",
        "6,7_g.png,54,845,PA,x,['exclude'],",
    ]
    header = ",ImageID,ImageDir,PatientID,Projection,Report,Labels,labelCUIS"
    return write(raw, {"PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz": "\n".join([header, *rows])})



def rsna(raw: Path) -> Path:
    """The rows are real."""
    return write(
        raw,
        {
            "stage_2_train_labels.csv": "patientId,x,y,width,height,Target\n"
            "0004cfab-14fd-4e49-80ba-63a80b6bddd6,,,,,0\n"
            "00436515-870c-4b36-a041-de91049b9ab4,264.0,152.0,213.0,379.0,1\n"
            "00436515-870c-4b36-a041-de91049b9ab4,562.0,152.0,256.0,453.0,1\n",
            "pneumonia-challenge-dataset-mappings_2018.json": json.dumps(
                [{"subset_img_id": "0004cfab-14fd-4e49-80ba-63a80b6bddd6", "img_id": "00000013_004.png"}]
            ),
        },
    )


SIIM_NAMES = ["1.2.276.0.7230010.3.1.4.8323329.6904.1517875201.850819", "1.2.276.0.7230010.3.1.4.8323329.6904.1517875201.85"]



def siim_acr(raw: Path) -> Path:
    folder = raw / "dicom-images-train" / "study" / "series"
    folder.mkdir(parents=True)
    (folder / f"{SIIM_NAMES[0]}.dcm").write_bytes(b"")
    table = f"ImageId, EncodedPixels\n{SIIM_NAMES[0]}, -1\n{SIIM_NAMES[1]}, 1026 2 1022 3\n{SIIM_NAMES[1]},0 1\n"
    return write(raw, {"train-rle.csv": table})



def vindr_cxr(raw: Path) -> Path:
    names = "Atelectasis,Nodule/Mass,Other disease,No finding"
    return write(
        raw,
        {
            "annotations/image_labels_train.csv": f"image_id,rad_id,{names}\n"
            "a,R1,0,1,0,0\na,R2,1,0,0,0\na,R3,0,0,0,1\nb,R1,0,0,0,1\nb,R2,0,0,0,1\nb,R3,0,0,0,1\n",
            "annotations/annotations_train.csv": "image_id,rad_id,class_name,x_min,y_min,x_max,y_max\n"
            "a,R1,Nodule/Mass,10,20,40,60\na,R2,Atelectasis,1,2,3,4.5\nb,R1,No finding,,,,\n",
            "annotations/image_labels_test.csv": f"image_id,{names}\nc,0,0,1,0\n",
            "annotations/annotations_test.csv": "image_id,class_name,x_min,y_min,x_max,y_max\nc,Other disease,1,1,2,2\n",
        },
    )



def candid_ptx(raw: Path) -> Path:
    return write(
        raw,
        {
            "Pneumothorax_reports.csv": "SOPInstanceUID,Report,EncodedPixels\n1.2.3,Small apical.,5 6\n1.2.3,Small apical.,7 8\n"
            "1.2.4,Clear.,-1\n1.2.5,Clear.,\n",
            "chest_tube.csv": "SOPInstanceUID,anchor,mask_rle\n1.2.3,x,1 2\n1.2.4,,-1\n",
            "chest_radiographs/1.2.3.dcm": "",
            "chest_radiographs/1.2.4": "",
        },
    )



def dicom_file(path: Path, photometric: str, pixels: np.ndarray) -> None:
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    file = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    file.Rows, file.Columns = pixels.shape
    file.SamplesPerPixel, file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 1, 8, 8, 7, 0
    file.PhotometricInterpretation, file.PixelData, file.PatientName = photometric, pixels.tobytes(), "SECRET"
    path.parent.mkdir(parents=True, exist_ok=True)
    file.save_as(path, enforce_file_format=True)



def covidx(raw: Path) -> Path:
    return write(
        raw,
        {
            "train.txt": "3 a.jpg positive cohen\n3 b.png negative rsna\n4  c.png COVID-19 sirm \n",
            "val.txt": "5 MIDRC-RICORD-1C-419639-0.png normal ricord\n",
            "test.txt": "6 e.png pneumonia RSNA\n7 f.png odd rsna\n",
        },
    )



def rexgradient(raw: Path) -> Path:
    files: dict[str, str] = {}
    for split, study in (("train", "s1"), ("valid", "s2"), ("test", "s3")):
        files[f"metadata/{split}_metadata.csv"] = (
            f'id,PatientAge,Indication,Comparison,Findings,Impression\n{study},007Y,Cough,,"Clear.\nStable.",Normal.\n'
        )
        where = f"../deid_png/PATIENT9/{study}/studies/1.2/series/3.4/instances"
        views = {study: {"ImagePath": [f"{where}/5.6.png", f"{where}/5.7.png"], "ImageViewPosition": ["POSTERO_ANTERIOR", None]}}
        files[f"metadata/{split}_metadata_view_position.json"] = json.dumps(
            views | ({"alone": views[study]} if split == "test" else {})
        )
    files["metadata/train_metadata.csv"] += "s9,007Y,,,,x\n"
    return write(raw, files)



def rocov2(raw: Path) -> Path:
    return write(raw, {f"{split}_captions.csv": f'ID,Caption\nROCOv2_2023_{split}_000001,"CT, axial."\n'
                     for split in ("train", "valid", "test")})  # fmt: skip


MINIATURES: dict[str, Callable[[Path], Path]] = {
    "brax": brax, "candid-ptx": candid_ptx, "chexpert": chexpert, "chexpert-plus": chexpert_plus, "covidx": covidx,
    "folder": folder, "jsonl": jsonl, "mimic-cxr": mimic, "mimic-cxr-jpg": mimic, "nih": nih, "openi": openi,
    "padchest": padchest, "parquet": parquet, "rexgradient": rexgradient, "rocov2": rocov2, "rsna": rsna,
    "siim-acr": siim_acr, "vindr-cxr": vindr_cxr,
}  # fmt: skip
"""Recipe -> what writes its miniature into a folder."""


def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    """`mmclip pack ...` in this process -> exit code, standard output, standard error."""
    monkeypatch.setattr("sys.argv", ["mmclip", "pack", *arguments])
    try:
        code = cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    told = capsys.readouterr()
    return code, told.out, told.err
