"""`mmclip demo`: the page's figures are the model's, nothing that is uploaded can break out, and too much is refused."""

from __future__ import annotations

import io
import re
import shutil
import socket
import subprocess
import sys
from html import escape
from pathlib import Path

import pytest
from mmclip_shards.document import read_document
from mmclip_shards.reader import iterate
from PIL import Image
from starlette.testclient import TestClient

from mmclip_dist import MMCLIPModel, load_prompts
from mmclip_dist.demo import app as app_of_demo
from mmclip_dist.demo.answer import Reports, answer, parse_findings
from mmclip_dist.demo.app import build_app
from tests.conftest import wait_for
from tests.test_cli import call

HOSTILE = '<script>alert("x")</script>'


@pytest.fixture(scope="module")
def run(untrained: Path) -> Path:
    return untrained


@pytest.fixture(scope="module")
def model(run: Path) -> MMCLIPModel:
    return MMCLIPModel.from_pretrained(run, device="cpu")


@pytest.fixture(scope="module")
def image(sets) -> bytes:
    return next(members["png"] for _, members in iterate(sets.test))


@pytest.fixture
def client(model: MMCLIPModel) -> TestClient:
    return TestClient(build_app(model, title="T", findings=("Edema",), hosts=("testserver",)))


def ask(client: TestClient, image: bytes | None, findings: str = "edema"):
    files = {} if image is None else {"image": ("x.png", image)}
    return client.post("/", data={"findings": findings}, files=files or {"image": ("", b"")})


def test_the_scores_are_those_of_the_model_and_come_in_order(model: MMCLIPModel, image: bytes) -> None:
    names = ["Edema", "Mass", "Nodule", "Pleural Effusion"]
    texts = load_prompts(names).texts
    present = {name: [pair[place] for pair in texts] for place, name in enumerate(names)}
    absent = {name: [pair[len(names) + place] for pair in texts] for place, name in enumerate(names)}
    expected = model.zero_shot(image, present, absent)
    found = answer(model, image, names)
    scores = {row.finding: row.score for row in found.findings}
    assert scores == pytest.approx(dict(zip(names, expected.scores[0].tolist(), strict=True)))
    assert [row.score for row in found.findings] == sorted((row.score for row in found.findings), reverse=True)
    assert [row.heat is not None for row in found.findings] == [True, True, True, False] and not found.nearby


def test_the_nearest_reports_are_those_with_the_highest_cosine_each_once(model: MMCLIPModel, sets, image: bytes) -> None:
    held = {read_document(members).report for _, members in iterate(sets.paired)}
    embedded = model.encode_image(image)[0]
    expected = sorted(((float(model.encode_text(text)[0] @ embedded), text) for text in held), reverse=True)[:3]
    found = answer(model, image, ["Edema"], Reports(model, sets.paired)).nearby
    assert [near.text for near in found] == [text for _, text in expected]
    assert [near.cosine for near in found] == pytest.approx([cosine for cosine, _ in expected], abs=1e-5)
    with pytest.raises(ValueError, match="has no reports to search"):
        Reports(model, sets.unpaired)


def test_findings_are_lines_or_have_commas_between_them() -> None:
    assert parse_findings(" edema,mass \n\n  pleural   effusion; edema\n") == ["edema", "mass", "pleural effusion"]
    many = ",".join("abcdefghijklmnopqrstu")
    for text, told in ((" ,\n", "No finding is given"), ("x" * 81, "At most 20 findings"), (many, "At most 20 findings")):
        with pytest.raises(ValueError, match=told):
            parse_findings(text)


def test_a_page_of_figures(client: TestClient, image: bytes) -> None:
    home, found = client.get("/"), ask(client, image, f"edema\n{HOSTILE}")
    assert home.status_code == found.status_code == 200 and "Edema</textarea>" in home.text
    assert "For research only, not for diagnosis." in home.text
    assert found.text.count("<meter") == 2 and escape(HOSTILE, quote=False).split("alert")[0] in found.text
    for page in (home, found):
        assert "<script" not in page.text and page.headers["cache-control"] == "no-store"
        assert page.headers["content-security-policy"].startswith("default-src 'none'; ")
        assert not re.search(r'(?:href|src)="(?!data:|#)', page.text)


@pytest.mark.parametrize(
    ("image", "findings", "told"),
    [
        (b"no image", "edema", "not a usable JPEG, PNG or WebP"),
        (None, "edema", "No image is given"),
        (b"", "edema", "No image is given"),
        (b"\0" * 128 + b"DICM" + b"\1" * 50, "edema", "DICOM"),
        ("good", " , ", "No finding is given"),
    ],
)
def test_what_cannot_be_answered_is_said_on_the_page(client: TestClient, image: bytes, findings: str, told: str, request) -> None:
    given = request.getfixturevalue("image") if image == "good" else image
    found = ask(client, given, findings)
    assert found.status_code == 400 and re.search(f'id="fault">[^<]*{told}', found.text)


def test_a_picture_of_too_many_pixels_is_refused(client: TestClient) -> None:
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    assert ask(client, buffer.getvalue()).status_code == 400


def test_a_large_upload_is_refused(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, image: bytes
) -> None:
    monkeypatch.setattr(app_of_demo, "MAX_UPLOAD", 10_000)

    def body():
        yield b'--b\r\nContent-Disposition: form-data; name="image"; filename="x.png"\r\n\r\n'
        for _ in range(20):
            yield b"x" * 1000

    found = client.post("/", content=body(), headers={"Content-Type": "multipart/form-data; boundary=b"})
    assert found.status_code == 413 and "The upload is larger than" in found.text


def test_another_name_for_this_address_is_refused(client: TestClient) -> None:
    assert client.get("/", headers={"Host": "elsewhere.example"}).status_code == 400


def test_a_port_that_is_taken_is_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _ = call("demo", str(run), "--port", str(taken.getsockname()[1]))
    output, errors = capsys.readouterr()
    assert code == 2 and not output and "choose another port" in errors and errors.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("chromedriver") is None, reason="needs the Debian packages chromium and chromium-driver"
)
def test_a_browser_uploads_an_image_and_then_a_bad_file(run: Path, sets, image: bytes, tmp_path: Path) -> None:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.expected_conditions import presence_of_element_located
    from selenium.webdriver.support.wait import WebDriverWait

    (tmp_path / "good.png").write_bytes(image)
    (tmp_path / "bad.png").write_bytes(b"no image")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu"):
        options.add_argument(flag)
    log = tmp_path / "demo.log"
    with log.open("w") as output:
        command = [sys.executable, "-m", "mmclip_dist.cli", "demo", str(run), "--data", sets.test, "--port", str(port)]
        demo = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    browser = None

    def answered(part: str) -> str:  # a click returns before the page that answers it has come
        return WebDriverWait(browser, 60).until(presence_of_element_located((By.ID, part))).text

    try:
        wait_for(lambda: demo.poll() is not None or "open http" in log.read_text())
        browser = webdriver.Chrome(options=options, service=Service(str(shutil.which("chromedriver"))))
        browser.get(f"http://127.0.0.1:{port}/")
        browser.find_element(By.NAME, "image").send_keys(str(tmp_path / "good.png"))
        browser.find_element(By.TAG_NAME, "button").click()
        told = answered("answer")
        assert "Attention for" in told and "Nearest reports" in told
        drawn = browser.execute_script("return document.querySelector('#answer svg').getBoundingClientRect().height")
        assert drawn > 50
        browser.find_element(By.NAME, "image").send_keys(str(tmp_path / "bad.png"))
        browser.find_element(By.TAG_NAME, "button").click()
        assert "not a usable JPEG, PNG or WebP" in answered("fault")
        blocked = [entry for entry in browser.get_log("browser") if entry["source"] != "network"]  # by the page's policy
        assert not blocked
    finally:
        if browser:
            browser.quit()
        demo.terminate()
        demo.wait(20)
