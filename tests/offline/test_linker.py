"""Concepts of entities from a small knowledge base, in the files of scispaCy's linkers and laid where it keeps its downloads."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("scispacy", reason="needs the extra nlp")

import numpy as np
import scispacy.file_cache
from scispacy import candidate_generation
from scispacy.candidate_generation import DEFAULT_KNOWLEDGE_BASES, DEFAULT_PATHS, LinkerPaths
from scispacy.linking_utils import KnowledgeBase

from mmclip_dist.offline.clinical_text import build_extractor, extractor_hash
from mmclip_dist.offline.entities import entities_stage

CONCEPTS = {"C0032227": ["Pleural effusion", "Effusion, pleural"], "C0032326": ["Pneumothorax"], "C0004144": ["Atelectasis"]}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the linker `mesh`, under the names that scispaCy gives its downloads."""
    made, cache = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("cache")
    concepts = made / "concepts.jsonl"
    rows = [
        {"concept_id": cui, "canonical_name": names[0], "aliases": names[1:], "types": [], "definition": "d"}
        for cui, names in CONCEPTS.items()
    ]
    concepts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    index = LinkerPaths.from_directory(made)
    aliases = list(KnowledgeBase(str(concepts)).alias_to_cuis)
    vectorizer = candidate_generation.TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 3), dtype=np.float32)
    vectors = vectorizer.fit_transform(aliases)
    nmslib = candidate_generation.nmslib
    neighbours = nmslib.init(method="hnsw", space="cosinesimil_sparse", data_type=nmslib.DataType.SPARSE_VECTOR)
    neighbours.addDataPointBatch(vectors)
    neighbours.createIndex({"indexThreadQty": 1})
    neighbours.saveIndex(index.ann_index)
    candidate_generation.joblib.dump(vectorizer, index.tfidf_vectorizer)
    Path(index.concept_aliases_list).write_text(json.dumps(aliases))
    parts = {"data": vectors.data.astype(np.float16), "indices": vectors.indices, "indptr": vectors.indptr}
    np.savez(index.tfidf_vectors, format=b"csr", shape=vectors.shape, **parts)  # scipy itself saves no half precision
    url = inspect.signature(DEFAULT_KNOWLEDGE_BASES["mesh"]).parameters["file_path"].default
    for address, path in zip((*DEFAULT_PATHS["mesh"], url), (*index, concepts), strict=True):
        shutil.copy(path, cache / scispacy.file_cache.url_to_filename(address, etag="v1"))
    return cache


def test_entities_get_the_concept_that_they_name(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scispacy.file_cache, "DATASET_CACHE", str(cache))
    found = build_extractor(linker="mesh")(["No pleural effusion. Pneumothorax of the hilum. Pleural effusion."])[0]
    assert [(entity.text, entity.cui, entity.negated) for entity in found] == [
        ("pleural effusion", "C0032227", True), ("Pneumothorax", "C0032326", False), ("hilum", None, False),
        ("Pleural effusion", "C0032227", False),
    ]  # fmt: skip
    assert found[0].term == "pleural effusion"


def test_another_version_of_the_files_is_another_stage(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(scispacy.file_cache, "DATASET_CACHE", str(shutil.copytree(cache, tmp_path / "cache")))
    before = extractor_hash(linker="mesh")
    stage = entities_stage("base", "out", linker="mesh")
    assert stage.config_hash == before != extractor_hash() and stage.measured and not entities_stage("base", "out").measured
    path = next((tmp_path / "cache").glob("*.jsonl"))
    path.rename(path.with_name(path.name.replace(path.name.split(".")[1], "other")))
    assert extractor_hash(linker="mesh") != before


def test_a_missing_file_is_named_and_never_downloaded(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(scispacy.file_cache, "DATASET_CACHE", str(tmp_path))
    monkeypatch.setattr("requests.head", lambda *_, **__: pytest.fail("asks the network"))
    with pytest.raises(ValueError, match=rf"linker umls: {tmp_path}/\w+\.nmslib_index\.bin is not here.*get https://") as error:
        build_extractor(linker="umls")
    assert "\n" not in str(error.value)
    shutil.copytree(cache, tmp_path, dirs_exist_ok=True)
    vectors = next(tmp_path.glob("*.npz"))
    shutil.copy(vectors, vectors.with_name(vectors.name.replace(vectors.name.split(".")[1], "newer")))
    with pytest.raises(ValueError, match=r"tfidf_vectors_sparse\.npz is here 2 times; keep one"):
        build_extractor(linker="mesh")
    with pytest.raises(ValueError, match="no linker 'snomed': choose one of umls, mesh"):
        build_extractor(linker="snomed")
