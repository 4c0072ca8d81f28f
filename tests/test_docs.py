"""The documentation against the code: links, commands, recipes, settings, defaults, messages, files, examples.

And the commands of the quick start and of "your own data", done for real on tiny data.
"""

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
import yaml
from pydantic import BaseModel

from flows.cli import app
from flows.evaluation import find_evaluator, settings
from flows.experiment import Recipe, load_experiment, merge, resolve
from flows.overrides import apply_override, field_names, split_override
from storage.objects import Store
from storage.shards import ShardSample, write_tar
from tests.flows.runs import TINY, nst_in_one_process
from tests.real_images import jpeg, pngs, write_images

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "deployments/README.md", *sorted(DOCS.glob("*.md"))]
GROUP: Any = typer.main.get_command(app)
SECTIONS = ("data", "train", "teacher", "student", "selector", "iterations", "label", "select", "evaluate", "compute")
SETTING = re.compile(rf"({'|'.join(SECTIONS)})(\.[a-z0-9_]+)+")
FILE = re.compile(r"((?:flows|tasks|models|storage|deployments|tests|benchmarks|docs)/[\w./-]*\w)(?::(\w+))?$")

ELSEWHERE = {  # commands of the pages that no test here can run, and why
    "docker": "no machine of the project has a Docker daemon",
    "kubectl": "no machine of the project has a Kubernetes cluster",
    "prefect": "Prefect's own; tests/flows/test_serve.py and test_recovery.py run server, worker, deploy as `nst serve` does",
    "env": "env -u and env --default-signal, before a command of Prefect's",
    "export": "sets the shell's environment",
    "pip": "an extra; the tests' environment has all of them",
    "python": "python -m deployments.seaweedfs, the S3 server of the tests, as `make demo STORE=s3` starts it",
    ".": "activates the environment",
    "make": "make demo is `nst demo`, which the quick start runs at a tiny size; make test is what runs this",
}
IMAGINED = ("tasks/evaluators/confident.py",)  # files that an example would make
NOT_DONE = {  # of the quick start and of "your own data"
    "nst serve": "works until Ctrl-C: tests/flows/test_serve.py",
    "nst run birds.yaml": "trains EfficientNet-B0 for 350 epochs, which wants a GPU",
}
TINY_DEMO = ("iterations=[{}, {}]", *(text for text in TINY if not text.startswith("iterations=")))


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    language: str
    text: str


def blocks(page: Path, *languages: str) -> list[Block]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [Block(page, language, text) for language, text in found if not languages or language in languages]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def inline(page: Path) -> list[str]:
    """What stands in backticks within the text."""
    return [text.replace("\n", " ") for text in re.findall(r"`([^`]+)`", prose(page))]


def lines_of(block: Block) -> list[str]:
    """Its commands, without what is said of them: after ` # `, or after several spaces."""
    return [re.split(r"\s+#\s|\s{2,}", line)[0].strip() for line in block.text.splitlines() if line.strip()]


def commands(page: Path) -> list[str]:
    return [line for block in blocks(page, "", "sh") for line in lines_of(block) if line.startswith("nst ")]


def names(pages: list[Path]) -> list[str]:
    return [page.relative_to(ROOT).as_posix() for page in pages]


each_page = pytest.mark.parametrize("page", PAGES, ids=names(PAGES))


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_every_link_leads_to_a_file_and_its_heading(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert not anchor or anchor in slugs(found), target


def test_the_index_names_every_page() -> None:
    text = (DOCS / "README.md").read_text()
    assert [page.name for page in DOCS.glob("*.md") if page.name != "README.md" and f"({page.name})" not in text] == []


@each_page
def test_files_that_are_named_are_there_and_have_what_is_named_of_them(page: Path) -> None:
    for text in inline(page):
        found = FILE.match(text)
        if found and "*" not in text and text not in IMAGINED:
            path = ROOT / found[1]
            assert path.exists(), text
            assert not found[2] or re.search(rf"\b{found[2]}\b", path.read_text()), text
    for name in re.findall(r"python -m benchmarks\.(\w+)", page.read_text()):
        assert (ROOT / f"benchmarks/{name}.py").exists(), name


def parse(words: list[str]) -> None:
    """Parse a command line as `nst` does, and its overrides; run nothing."""
    if words[0].startswith("-"):
        assert words[0] in {name for param in GROUP.params for name in param.opts}, words
        return
    assert words[0] in GROUP.commands, words
    context = GROUP.commands[words[0]].make_context(words[0], words[1:])
    overrides = context.params.get("overrides") or []
    if words[0] == "evaluate":
        settings(find_evaluator(context.params["evaluator"]), context.params["data"], overrides)
        return
    for text in overrides:
        dotted, value = split_override(text)
        apply_override(Recipe, {"iterations": [{}, {}, {}]}, dotted, value, "override")


@each_page
def test_every_nst_command_of_a_block_parses(page: Path) -> None:
    for line in commands(page):
        try:
            parse(shlex.split(line)[1:])
        except Exception as error:
            raise AssertionError(f"{line}: {error}") from error


@each_page
def test_every_nst_command_of_the_text_exists_with_its_options(page: Path) -> None:
    for text in inline(page):
        words = text.split()
        if words[0] != "nst" or len(words) == 1 or words[1].isupper():
            continue
        found = GROUP if words[1].startswith("-") else GROUP.commands[words[1]]
        known = {"--help"} | {name for param in found.params for name in param.opts}
        assert [word for word in words[1:] if word.startswith("--") and word not in known] == [], text


@each_page
def test_every_other_command_says_why_no_test_runs_it(page: Path) -> None:
    for block in blocks(page, "sh"):
        for line in lines_of(block):
            assert line.startswith("nst ") or line.split()[0] in ELSEWHERE, line


@each_page
def test_every_setting_that_is_named_exists(page: Path) -> None:
    known = field_names(Recipe)
    for text in inline(page):
        dotted = re.split(r"[=:]", text)[0].strip()
        if SETTING.fullmatch(dotted):
            assert re.sub(r"^iterations\.\d+", "iterations.1", dotted) in known, text


def whole_recipes(page: Path) -> Iterator[tuple[str, str]]:
    """The file name, in its first line, and the text of every recipe that is shown as a whole."""
    for block in blocks(page, "yaml"):
        if "name" in yaml.safe_load(block.text):
            yield block.text.splitlines()[0].removeprefix("# "), block.text


@each_page
def test_every_recipe_is_valid_with_each_of_its_scales(page: Path, tmp_path: Path) -> None:
    own = list(whole_recipes(page))
    for name, text in own:
        assert re.fullmatch(r"[\w-]+\.yaml", name), f"say in the first line how the file is called: {text}"
        (tmp_path / name).write_text(text)
    for name, text in own:
        load_experiment(str(tmp_path / name))
        for scale in yaml.safe_load(text).get("scales", {}):
            load_experiment(str(tmp_path / name), scale=scale)
    for block in blocks(page, "yaml"):
        raw = yaml.safe_load(block.text)
        if "name" in raw:
            continue
        ((_, below),) = whole_recipes(ROOT / "README.md")
        whole = merge(yaml.safe_load(below), raw)
        for fields in (whole.pop("scales", None) or {}).values():
            for dotted, value in fields.items():
                apply_override(Recipe, whole, dotted, value, page.name)
        resolve(whole, page.name)


def documented_settings() -> dict[str, str]:
    """Every setting in the field tables of docs/recipes.md with what stands there as its default."""
    found = {}
    for line in prose(DOCS / "recipes.md").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        dotted = re.findall(r"`([^`]+)`", cells[0])
        if len(cells) == 3 and dotted and all(SETTING.fullmatch(name) for name in dotted):
            values = re.split(r",\s", cells[1])
            values = values if len(values) == len(dotted) else values * len(dotted) if len(values) == 1 else []
            found |= dict(zip(dotted, values or [""] * len(dotted), strict=True))
    return found


def default_of(dotted: str) -> Any:
    """A field's default, as pydantic has it; a section's is None."""
    model: Any = Recipe
    for step in dotted.split("."):
        field = model.model_fields[step]
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
    return None if model else field.default


def test_docs_recipes_has_every_setting() -> None:
    listed = set(documented_settings())
    wanted = [
        n for n in field_names(Recipe) if n.split(".")[0] in ("data", "train", "label", "select", "evaluate", "compute")
    ]
    leaves = [name for name in wanted if not any(other.startswith(f"{name}.") for other in wanted)]
    missing = [name for name in leaves if not any(name == own or name.startswith(f"{own}.") for own in listed)]
    assert missing == []
    assert len(leaves) > 100


def test_docs_recipes_says_the_true_defaults() -> None:
    checked = 0
    for dotted, said in documented_settings().items():
        quoted = re.match(r"`([^`]*)`", said)
        text = (quoted[1] if quoted else said).replace(",", "")
        true = default_of(dotted)
        if isinstance(true, bool):
            assert text == str(true).lower(), dotted
        elif isinstance(true, int | float) and re.fullmatch(r"-?[\d.]+", text):
            assert float(text) == true, dotted
        elif isinstance(true, str) and true and said.startswith("`"):
            assert text == true, dotted
        else:
            continue
        checked += 1
    assert checked > 70


def literals() -> list[str]:
    """Every string of the program, of f-strings the constant pieces."""
    found = []
    for layer in ("flows", "tasks", "models", "storage"):
        for path in (ROOT / layer).rglob("*.py"):
            nodes = ast.walk(ast.parse(path.read_text()))
            found += [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return found


def test_the_messages_of_when_it_fails_are_those_of_the_program() -> None:
    known = literals()
    messages = [line for block in blocks(DOCS / "when-it-fails.md", "text") for line in block.text.splitlines()]
    assert len(messages) > 20
    for message in messages:
        pieces = [piece.strip(" .:;,()") for piece in message.split("...")]
        pieces = [piece.removeprefix("override: ") for piece in pieces if len(piece) > 5]
        assert pieces, message
        for piece in pieces:
            assert any(piece in text for text in known), f"{message}: nowhere is it said {piece!r}"


def with_options(words: list[str]) -> list[str]:
    """Without Prefect, where a command offers that: what a stage does is the same."""
    found = GROUP.commands[words[0]]
    return [*words, "--prefect", "off"] if any("--prefect" in param.opts for param in found.params) else words


def steps(page: Path) -> Iterator[list[str]]:
    """The commands of a page that are done, in their order."""
    for block in blocks(page, "sh"):
        for line in lines_of(block):
            if line.startswith("nst ") and line not in NOT_DONE:
                yield shlex.split(line)[1:]


def test_the_quick_start_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NST_STORE", "demo-store")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    page = DOCS / "quick-start.md"
    assert "export NST_STORE=demo-store" in page.read_text()
    done = [["run", "digits", *TINY_DEMO, "--prefect", "off"]]
    for words in steps(page):
        tiny = TINY_DEMO if words[:2] in (["run", "digits"], ["plan", "digits"]) else ()
        done.append(with_options([*words[:2], *tiny, *words[2:]]))
    output, _ = nst_in_one_process(done, tmp_path)
    assert "1/select will keep" in output
    assert "digits/3/student" in output, "one more iteration"
    assert output.count("1/label: reused") == 3, "another threshold, the first one again, one more iteration"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo-store", "lineage.html", "my-student", "seven.png"]
    exported, read = (block.text for block in blocks(page, "python"))
    image = "from PIL import Image; image = Image.new('RGB', (28, 28))\n"
    printed = subprocess.run(
        [sys.executable, "-c", f"{image}{exported}print(probabilities.shape)\n{read}"],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert "torch.Size([1, 10])" in printed
    assert "avg(confidence)" in printed
    assert {"npy", "json"} <= set(re.findall(r"'(npy|json)'", printed))


def write_class_folders(root: Path) -> None:
    seed = 0
    for split, count in (("train", 8), ("val", 3), ("test", 3), ("crawl", 12)):
        for name in ("owl", "robin") if split != "crawl" else ("a", "b"):
            for number in range(count):
                seed += 1
                path = root / split / name / f"{number:03d}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(jpeg(seed))


def write_tables(root: Path) -> None:
    for place, (name, count) in enumerate((("labeled-0", 16), ("val", 6), ("test", 6), ("unlabeled-0", 24))):
        own = None if name == "unlabeled-0" else [number % 2 for number in range(count)]
        write_images(root / f"{name}.parquet", pngs(count, 1000 * place), own, ("owl", "robin") if own else None)


def upload_tars(photos: Store, crawl: Store, folder: Path) -> None:
    for place, (name, count) in enumerate((("labeled/0", 16), ("val/0", 6), ("test/0", 6), ("0", 24))):
        images = enumerate(pngs(count, 1000 * place))
        labels = {} if name == "0" else {"cls": b"%d"}
        samples = [
            ShardSample(f"{n:04d}", {"png": data, **{kind: form % (n % 2) for kind, form in labels.items()}})
            for n, data in images
        ]
        write_tar(folder / "some.tar", samples)
        (crawl if name == "0" else photos).put_file(folder / "some.tar", f"{name}.tar")


def test_your_own_data_does_what_it_says_with_each_form(
    tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    page, work = DOCS / "your-own-data.md", tmp_path / "work"
    buckets = {"s3://photos/birds": f"{s3}/photos", "s3://crawl/shards": f"{s3}/crawl", "s3://team/nst": f"{s3}/store"}

    def here(text: str) -> str:
        for said, real in buckets.items():
            text = text.replace(said, real)
        return text

    write_class_folders(work / "photos")
    write_tables(work / "tables")
    upload_tars(Store(f"{s3}/photos"), Store(f"{s3}/crawl"), tmp_path)
    for name, text in whole_recipes(page):
        (work / name).write_text(here(text))
    done = [with_options([here(word) for word in words]) for words in steps(page)]
    assert {"birds.yaml", "birds-parquet.yaml", "birds-s3.yaml"} <= {word for words in done for word in words}
    output, _ = nst_in_one_process(done, work)
    assert "birds/1/student" in output
    for name, store in (
        ("birds", work / "nst-store"),
        ("birds-parquet", work / "nst-store"),
        ("birds-s3", f"{s3}/store"),
    ):
        assert Store(str(store)).paths(f"refs/{name}/unlabeled"), name
    tars = [path for path in Store(f"{s3}/store").paths("parts") if path.endswith(".tar")]
    assert len(tars) == 4, "labeled, read and shuffled, validation, test; the unlabeled one is not copied"
