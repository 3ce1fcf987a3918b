"""Make the default study's corpora, as jsonl, from pinned packages on PyPI (wheels.txt, pages.txt).

    clean.jsonl      mathematical and technical prose: docstrings of sympy, scipy, scikit-learn,
                     statsmodels and networkx; for the reference
    target.jsonl     held-out prose of the same kind
    technical.jsonl  the same kind, with a fraction of the lines damaged (Damage); for the policy
    web.jsonl        some two hundred web pages with menus, notices and scripts, mostly in German
                     and English, from the tests of packages that extract text (pages.txt); with
                     --generated-pages, pages made with Faker instead (Pages)
    general.jsonl    source files of Python's standard library, for the model that all start from

Each module is in only one of clean, target and technical, and no text is in two of them.
"""

from __future__ import annotations

import ast
import base64
import json
import random
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from argparse import ArgumentParser
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from megatron_slm.errors import exit_on_user_error
from megatron_slm.files import write_whole

HERE = Path(__file__).parent
WHEELS = """--only-binary :all: --python-version 312 --implementation cp
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64
    --platform manylinux2014_x86_64"""
PROSE = ("networkx", "scikit_learn", "scipy", "statsmodels", "sympy")
LEAST = 200  # characters; shorter docstrings say little
CORRUPTED = 0.3
WEB_CHARACTERS = 7_000_000
NODE_CHARACTERS = 4000  # kept of a real page's text between two tags
GENERAL_CHARACTERS = 5_000_000


def hash_of(text: str) -> int:
    """Hash a text by FNV-1a; unlike hash(), the result is the same on every machine."""
    value = 2_166_136_261
    for byte in text.encode():
        value = (value ^ byte) * 16_777_619 & 0xFFFFFFFF
    return value


def download(directory: Path, packages: str, options: str) -> None:
    """Download the packages that a file lists, check their hashes, and install nothing."""
    pip = "-m pip download --quiet --disable-pip-version-check --no-deps --require-hashes".split()
    wanted = ["--requirement", str(HERE / packages), "--dest", str(directory)]
    subprocess.run([sys.executable, *pip, *options.split(), *wanted], check=True)


def modules(directory: Path) -> Iterator[tuple[str, str]]:
    """Yield the name and source of every module of the mathematical packages, ordered by a
    hash."""
    found = []
    for wheel in sorted(directory.glob("*.whl")):
        if wheel.name.startswith(PROSE):
            archive = zipfile.ZipFile(wheel)
            names = (name for name in archive.namelist() if name.endswith(".py"))
            found += [(name, archive) for name in names if "/tests/" not in name]
    for name, archive in sorted(found, key=lambda one: hash_of(one[0])):
        yield name, archive.read(name).decode("utf-8", "replace")


def docstrings(source: str) -> Iterator[str]:
    """Yield the long docstrings of a module and of everything it defines."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            text = ast.get_docstring(node)
            if text and len(text) >= LEAST:
                yield text


class Damage:
    """Makes spans of lines worthless, as broken encodings, scans and scrapers do.

    The fraction CORRUPTED of a document's lines is damaged, in spans of one to four.  A span gets
    random characters replaced, its words shuffled, the letters of each word shuffled, or is
    replaced by random bytes in base64.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def damage(self, text: str) -> str:
        lines = text.splitlines()
        at = 0
        while at < len(lines):
            span = self.random.randint(1, 4)
            if self.random.random() < CORRUPTED:
                kind = self.random.choice(
                    (self.replaced, self.reordered, self.scrambled, self.binary)
                )
                lines[at : at + span] = [kind(line) for line in lines[at : at + span]]
            at += span
        return "\n".join(lines)

    def replaced(self, line: str) -> str:
        letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789#$%&*@~^|"
        return "".join(
            self.random.choice(letters) if self.random.random() < 0.5 else one for one in line
        )

    def reordered(self, line: str) -> str:
        words = line.split()
        return " ".join(self.random.sample(words, len(words)))

    def scrambled(self, line: str) -> str:
        return " ".join("".join(self.random.sample(word, len(word))) for word in line.split(" "))

    def binary(self, line: str) -> str:
        return base64.b64encode(self.random.randbytes(len(line) * 3 // 4)).decode()


class Pages:
    """Makes web pages as text extraction leaves them, each of two to six random blocks."""

    def __init__(self, seed: int, fakers: list[Any]) -> None:
        self.random = random.Random(seed)
        self.fakers = fakers
        for number, faker in enumerate(fakers):
            faker.seed_instance(seed + number)

    def page(self) -> str:
        fake = self.random.choice(self.fakers)
        kinds = (
            self.menu,
            self.notice,
            self.listing,
            self.profile,
            self.filler,
            self.filler,
            self.log,
        )
        blocks = [self.random.choice(kinds)(fake) for _ in range(self.random.randint(2, 6))]
        return "\n\n".join(blocks)

    def menu(self, fake: Any) -> str:
        entries = [fake.word().title() for _ in range(self.random.randint(5, 12))]
        return self.random.choice((" | ", " > ", "\n", " · ")).join(["Home", *entries, "Contact"])

    def notice(self, fake: Any) -> str:
        return (
            f"We use cookies on {fake.domain_name()}. By continuing you accept our Privacy Policy "
            f"(last updated {fake.date()}). © {fake.year()} {fake.company()}. All rights reserved."
        )

    def listing(self, fake: Any) -> str:
        return "\n".join(
            f"{fake.word().title()} {fake.word()} {self.random.randrange(10**6)} - "
            f"${self.random.randrange(1, 9999) / 10:.2f} ({self.random.randrange(900)} reviews) "
            f"{fake.uri()}"
            for _ in range(self.random.randint(3, 8))
        )

    def profile(self, fake: Any) -> str:
        return (
            f"{fake.name()}\n{fake.address()}\n{fake.phone_number()} {fake.email()}\n"
            f"Joined {fake.date()} | {self.random.randrange(5000)} posts"
        )

    def filler(self, fake: Any) -> str:
        return "\n".join(fake.paragraph(nb_sentences=5) for _ in range(self.random.randint(1, 3)))

    def log(self, fake: Any) -> str:
        return "\n".join(
            f'{fake.ipv4()} [{fake.date()}] "GET /{fake.uri_path()}" {fake.user_agent()}'
            for _ in range(self.random.randint(2, 5))
        )


def generated_pages(directory: Path) -> Iterator[str]:
    """Yield pages without end, made with the downloaded Faker."""
    (wheel,) = directory.glob("faker-*.whl")
    package = directory / wheel.stem
    zipfile.ZipFile(wheel).extractall(package)
    sys.path.insert(0, str(package))
    from faker import Faker

    locales = ("en_US", "en_US", "de_DE", "fr_FR", "la", "pl_PL")
    pages = Pages(1, [Faker(locale) for locale in locales])
    while True:
        yield pages.page()


class PageText(HTMLParser):
    """All text between tags, including scripts and styles, as careless extraction leaves it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.nodes: list[str] = []
        self.feed(page)

    def handle_data(self, data: str) -> None:
        if node := " ".join(data[:NODE_CHARACTERS].split()):
            self.nodes.append(node)


def real_pages(directory: Path) -> Iterator[str]:
    """Yield the text of each distinct page in the source packages."""
    seen: set[str] = set()
    for package in sorted(directory.glob("*.tar.gz")):
        with tarfile.open(package) as archive:
            for member in archive:
                if member.isfile() and member.name.endswith((".html", ".htm")):
                    file = archive.extractfile(member)
                    assert file is not None
                    text = "\n".join(PageText(file.read().decode("utf-8", "replace")).nodes)
                    if text not in seen:
                        yield text
                    seen.add(text)


def library() -> Iterator[str]:
    """Yield the standard library's source files, without tests and applications."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "pydoc_data"}
    found = [path for path in root.rglob("*.py") if not skip & set(path.parts)]
    for path in sorted(found, key=lambda path: hash_of(path.relative_to(root).as_posix())):
        yield path.read_text(encoding="utf-8", errors="replace")


def up_to(characters: int, texts: Iterator[str]) -> Iterator[str]:
    """Yield texts until they have so many characters."""
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


def prose(directory: Path) -> dict[str, list[str]]:
    """Return docstrings by corpus; of 100 modules, one goes to target and 30 to clean."""
    seen: set[str] = set()
    found: dict[str, list[str]] = {"clean": [], "target": [], "technical": []}
    damage = Damage(2)
    for number, (_, source) in enumerate(modules(directory)):
        place = number % 100
        part = "target" if place == 0 else "clean" if place <= 30 else "technical"
        texts = [text for text in docstrings(source) if text not in seen]
        seen.update(texts)
        found[part] += map(damage.damage, texts) if part == "technical" else texts
    return found


def main(arguments: list[str]) -> None:
    """Write the corpora."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="directory")
    parser.add_argument("--generated-pages", action="store_true", help="make web pages with Faker")
    args = parser.parse_args(arguments)
    output: Path = args.output
    wheels = output / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    download(wheels, "wheels.txt", WHEELS)
    corpora = prose(wheels)
    if args.generated_pages:
        corpora["web"] = list(up_to(WEB_CHARACTERS, generated_pages(wheels)))
    else:
        download(wheels, "pages.txt", "--no-binary :all:")
        corpora["web"] = list(real_pages(wheels))
    corpora["general"] = list(up_to(GENERAL_CHARACTERS, library()))
    for name, documents in corpora.items():
        lines = (json.dumps({"text": text}) + "\n" for text in documents)
        write_whole(output / f"{name}.jsonl", "".join(lines).encode())
        size = sum(map(len, documents)) / 1e6
        print(f"  {name:10}{len(documents):7} documents {size:6.2f} million characters", flush=True)


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
