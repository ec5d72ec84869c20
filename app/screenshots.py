"""python -m app.screenshots OUT: pictures of every page, light and dark, both languages, two widths.

Needs Chromium and the `dev` extra. Serves the pages itself, over a knowledge base of the handbook
made for the purpose, or over the one given with --kb.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER_ARGUMENTS = (
    "--no-sandbox", "--headless", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)
IDLE = '[data-testid="stApp"][data-test-script-state="notRunning"]'
MAIN_FORM = '[data-testid="stMain"] [data-testid="stForm"]'
ANSWERED = '.lr-answer:not([data-kind="live"])'
_QUESTIONS = {
    "zh-CN": "KV 缓存里为什么不存查询？",
    "en-US": "What is done in chunked prefill?",
}
_WIDTHS = {1280: 860, 390: 844}


def find_browser() -> str | None:
    """The path of an installed Chromium or Chrome."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def build_base(documents: Path, kb: Path) -> None:
    """Ingest a folder as a user would."""
    command = [sys.executable, "-m", "ingest", str(documents), "--kb", str(kb), "--quiet"]
    subprocess.run(command, cwd=REPOSITORY, env=_environment(kb), check=True, stdout=subprocess.DEVNULL)


def _environment(kb: Path) -> dict[str, str]:
    """This process's, with no setting but the knowledge base."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAG_")}
    # The browser works on the same machine: a model that computes on every core would starve it.
    kept["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 2) - 1))
    return {**kept, "RAG_KB": str(kb), "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}


@contextmanager
def serve(kb: Path, *, seconds: float = 60.0) -> Iterator[str]:
    """Run the pages over a knowledge base; gives their address.

    Raises RuntimeError with the server's output where it does not answer in time.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "streamlit", "run", "app/chat.py", "--server.port", str(port),
        "--server.headless", "true",
    ]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=_environment(kb), stdout=log, stderr=subprocess.STDOUT
        )
        address = f"http://127.0.0.1:{port}"
        try:
            if not _is_healthy(address, process, seconds):
                log.seek(0)
                raise RuntimeError(f"the page did not start:\n{log.read()}")
            yield address
        finally:
            process.terminate()
            process.wait(timeout=20)


def _is_healthy(address: str, process: subprocess.Popen[bytes], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/_stcore/health", timeout=2) as answer:
                if answer.status == 200:
                    return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    return False


def take_screenshots(browser: Any, address: str, out: Path) -> list[Path]:
    """The pictures, as out/PAGE-LANGUAGE-SCHEME-WIDTH.png."""
    taken: list[Path] = []
    for locale in _QUESTIONS:
        for scheme in ("light", "dark"):
            for width, height in _WIDTHS.items():
                context = browser.new_context(
                    viewport={"width": width, "height": height}, locale=locale, color_scheme=scheme
                )
                page = context.new_page()
                page.set_default_timeout(60_000)
                name = f"{locale[:2]}-{scheme}-{width}"
                for shown in _visit(page, address, locale):
                    file = out / f"{shown}-{name}.png"
                    page.screenshot(path=file)
                    taken.append(file)
                context.close()
    return taken


def _visit(page: Any, address: str, locale: str) -> Iterator[str]:
    """Go through the pages; yields the name of each view once it stands still."""
    page.goto(address)
    page.wait_for_selector('[data-testid="stChatInput"]')
    _settle(page)
    yield "welcome"
    page.get_by_test_id("stChatInputTextArea").fill(_QUESTIONS[locale])
    page.keyboard.press("Enter")
    page.wait_for_selector(ANSWERED)
    _settle(page)
    conversation = page.url
    if page.locator("a.lr-chip").count():
        page.locator("details.lr-source summary").first.click()
        page.locator(".lr-question").last.evaluate("element => element.scrollIntoView()")
        _settle(page)
        yield "answer"
        page.locator('[class*="st-key-view-"] button').first.click()
        page.wait_for_selector('[data-testid="stDialog"]')
        _settle(page)
        yield "source"
        page.keyboard.press("Escape")
    else:
        yield "answer"
    page.goto(f"{address}/knowledge")
    page.wait_for_selector('[data-testid="stDataFrame"]')
    _settle(page)
    yield "knowledge"
    page.goto(f"{address}/inside")
    page.locator(f"{MAIN_FORM} input").first.fill(_QUESTIONS[locale])
    page.keyboard.press("Enter")
    page.wait_for_selector(".lr-tokens")
    page.wait_for_selector("[data-testid='stVegaLiteChart'] canvas")
    _settle(page)
    yield "inside"
    # So that the next pictures do not show this conversation, and a base of the user's is as it was.
    page.goto(conversation)
    page.locator(".st-key-delete-conversation button").click()
    page.wait_for_selector('[class*="st-key-example-"], .lr-welcome')
    _settle(page)


def _settle(page: Any) -> None:
    page.wait_for_selector(IDLE)
    page.wait_for_timeout(700)  # transitions


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m app.screenshots", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the pictures")
    parser.add_argument("--kb", type=Path, help="knowledge base to show (default: one of knowledge/)")
    options = parser.parse_args(arguments)
    from playwright.sync_api import sync_playwright

    found = find_browser()
    if found is None:
        print(f"no browser: none of {', '.join(BROWSERS)} is on the PATH", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        kb = options.kb
        if kb is None:
            kb = Path(folder) / "kb"
            build_base(REPOSITORY / "knowledge", kb)
        with serve(kb.resolve()) as address, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=found, args=list(BROWSER_ARGUMENTS))
            for file in take_screenshots(browser, address, options.out):
                print(file)
            browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
