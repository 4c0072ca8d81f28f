"""The commands that look after a store: `ls`, `show`, `export`, `report`, `verify`, `gc`. None loads torch or Prefect."""

import json
import shutil
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from flows.terminal import EXIT_FAILED, JsonOption, StoreOption, artifact_of, console
from storage.artifacts import find, list_artifacts
from storage.errors import UserError
from storage.gc import Garbage, Sweep, collect, survey
from storage.lineage import names_of_artifacts
from storage.objects import Store
from storage.runs import read_run
from storage.verify import Verdict, discard_broken, verify_all, verify_artifact

RefArgument = Annotated[
    str,
    typer.Argument(help="A ref such as digits/2/student, digits/2/student@1 for an older one; or a key's beginning."),
]
KEY_DIGITS = 12  # of a key: more than tell artifacts apart
FEW = 12  # lines of a long list that are printed


def ls(store: StoreOption = "nst-store", as_json: JsonOption = False) -> None:
    """List the artifacts of a store.

    Example: nst ls --store s3://team/nst
    """
    opened = Store(store)
    manifests, names = list_artifacts(opened), names_of_artifacts(opened)
    if as_json:
        wanted = {"kind", "key", "stage", "inputs"}
        rows = [{**m.model_dump(mode="json", include=wanted), "refs": names.get(m.key, [])} for m in manifests]
        print(json.dumps(rows, indent=1))
        return
    table = Table(box=None)
    for column in ("kind", "key", "ref", "created", "files", "bytes"):
        table.add_column(column)
    for m in manifests:
        size = sum(entry.bytes for entry in m.files)
        ref = next(iter(names.get(m.key, [])), "")
        table.add_row(
            m.kind,
            m.key[:KEY_DIGITS],
            escape(ref),
            str(m.provenance.get("created", "")),
            str(len(m.files)),
            f"{size:,}",
        )
    console.print(table)


def show(ref: RefArgument, store: StoreOption = "nst-store") -> None:
    """Print an artifact's manifest: config, inputs, files, metrics, where and by what it was made. It is JSON.

    Example: nst show digits/2/student
    """
    print(artifact_of(Store(store), ref).model_dump_json(indent=1))


def report(
    run_name: Annotated[str, typer.Argument(metavar="RUN", help="An experiment (its newest run) or EXPERIMENT/N.")],
    file: Annotated[Path, typer.Argument(help="The page to write.")] = Path("report.html"),
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    store: StoreOption = "nst-store",
) -> None:
    """Save a run's report as a page of this machine.

    Example: nst report digits --store s3://bucket/nst
    """
    opened = Store(store)
    record = read_run(opened, run_name)
    node = record.node("report")
    manifest = find(opened, node.kind, node.key) if node else None
    if manifest is None:
        raise UserError(f"run {record.name} has no report yet; `nst run` makes it at its end")
    if file.exists() and not force:
        raise UserError(f"{file} exists already; give another name, or --force")
    with opened.local_copy(manifest.file("report.html")) as copy:
        shutil.copyfile(copy, file)
    console.print(f"report: {file.absolute()}", highlight=False, soft_wrap=True)


def export(
    ref: Annotated[str, typer.Argument(help="A model's ref, such as digits/2/student.")],
    folder: Annotated[Path, typer.Argument(help="An empty or new folder.")],
    store: StoreOption = "nst-store",
) -> None:
    """Write a model as a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads, with its model card.

    README.md is the card, for Hugging Face's hub too: numbers, training, data and teachers, limits, as the store has them.

    Example: nst export digits/2/student my-student
    """
    from models.configs import SMALL_IMAGE_NETWORKS
    from models.pretrained import CONFIG_FILE, WEIGHTS_FILE
    from tasks.model_card import VARIANTS, model_card

    opened = Store(store)
    manifest = artifact_of(opened, ref)
    if manifest.kind != "model":
        raise UserError(f"{ref} is no model but of kind {manifest.kind}; give a teacher's or a student's ref")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"folder {folder} is not empty; give a new one")
    card = model_card(opened, ref, manifest)
    folder.mkdir(parents=True, exist_ok=True)
    names = (CONFIG_FILE, WEIGHTS_FILE)
    with opened.local_copies([manifest.file(name) for name in names]) as copies:
        for name, copy in zip(names, copies, strict=True):
            shutil.copyfile(copy, folder / name)
    if json.loads((folder / CONFIG_FILE).read_text())["architecture"] in SMALL_IMAGE_NETWORKS:
        shutil.copyfile(VARIANTS, folder / VARIANTS.name)
    (folder / "README.md").write_text(card, encoding="utf-8", newline="\n")
    console.print(f'timm.create_model("local-dir:{folder}", pretrained=True)', highlight=False)


def verify(
    ref: Annotated[str, typer.Argument(help="A ref such as digits/1/select; left out with --all.")] = "",
    everything: Annotated[bool, typer.Option("--all", help="Every artifact, record and ref.")] = False,
    discard: Annotated[bool, typer.Option(help="Take back what is broken, so that `nst run` makes it anew.")] = False,
    store: StoreOption = "nst-store",
    as_json: JsonOption = False,
) -> None:
    """Hash what lies in the store again and name what is missing, short or altered. Exit code 1 where anything is.

    Example: nst verify digits/1/select
    """
    if bool(ref) == everything:
        raise UserError("give one ref to verify, or --all")
    opened = Store(store)
    with Progress(console=console, transient=True, disable=as_json or not sys.stdout.isatty()) as bars:
        bar = bars.add_task("hashing")

        def show_progress(done: int, total: int) -> None:
            bars.update(bar, completed=done, total=total)

        if everything:
            verdict = verify_all(opened, show_progress)
        else:
            verdict = verify_artifact(opened, artifact_of(opened, ref), show_progress)
    discarded = discard_broken(opened, verdict) if discard else []
    if as_json:
        problems = [problem.__dict__ for problem in verdict.problems]
        print(json.dumps({**verdict.__dict__, "problems": problems, "discarded": discarded}, indent=1))
    else:
        _print_verdict(opened, verdict, discarded)
    if verdict.problems and not discard:
        raise typer.Exit(EXIT_FAILED)


def gc(
    delete: Annotated[bool, typer.Option("--delete", help="Delete; without it nothing is changed.")] = False,
    days: Annotated[float, typer.Option(min=0, help="Younger things are left alone.")] = 7,
    keep_runs: Annotated[
        int, typer.Option(min=0, help="Keep what the newest N runs of each experiment need; 0: of all runs.")
    ] = 0,
    store: StoreOption = "nst-store",
    as_json: JsonOption = False,
) -> None:
    """Show what no run and no ref needs, and what interrupted work left behind; with --delete, delete it.

    Example: nst gc --keep-runs 3
    """
    opened = Store(store)
    sweep = collect(opened, days, keep_runs) if delete else survey(opened, days, keep_runs)
    if as_json:
        named = [{"kind": g.kind, "name": g.name, "bytes": g.bytes, "modified": g.modified} for g in sweep.garbage]
        print(json.dumps({"deleted": delete, "kept_artifacts": sweep.kept_artifacts, "garbage": named}, indent=1))
        return
    _print_sweep(sweep, delete, days)


def _print_verdict(store: Store, verdict: Verdict, discarded: list[str]) -> None:
    for problem in verdict.problems:
        needed = f"; needed by {', '.join(problem.needed_by)}" if problem.needed_by else ""
        console.print(f"[red]{problem.path}[/] {problem.what}{needed}", highlight=False, soft_wrap=True)
    for name in discarded:
        console.print(f"discarded: {name}", highlight=False, soft_wrap=True)
    records = f", {verdict.records:,} records" if verdict.records else ""
    checked = f"{verdict.artifacts:,} artifacts, {verdict.files:,} files, {verdict.bytes:,} bytes{records}"
    if not verdict.problems:
        console.print(f"[green]all is as it was written:[/] {checked}", highlight=False)
        return
    advice = "run again to make it anew" if discarded else "--discard takes it back, then `nst run` makes it anew"
    console.print(f"{len(verdict.problems)} problems in {checked}; {advice}", highlight=False)


def _print_sweep(sweep: Sweep, deleted: bool, days: float) -> None:
    kinds: dict[str, list[Garbage]] = defaultdict(list)
    for garbage in sweep.garbage:
        kinds[garbage.kind].append(garbage)
    for kind, own in kinds.items():
        size, objects = sum(g.bytes for g in own), sum(len(g.objects) for g in own)
        console.print(f"[bold]{kind}[/]: {len(own):,} ({objects:,} objects, {size:,} bytes)", highlight=False)
        for garbage in own[:FEW]:
            written = time.strftime("%Y-%m-%d", time.gmtime(garbage.modified))
            console.print(f"  {garbage.name}  {garbage.bytes:,} bytes, {written}", highlight=False, soft_wrap=True)
        if len(own) > FEW:
            console.print(f"  and {len(own) - FEW:,} more (--json names all)", highlight=False)
    total = sum(g.bytes for g in sweep.garbage)
    verb = "deleted" if deleted else "would be deleted; --delete does it"
    console.print(
        f"{total:,} bytes older than {days:g} days {verb}; {sweep.kept_artifacts} artifacts kept", highlight=False
    )
    if sweep.leases:
        holders = ", ".join(f"{lease.what} ({lease.holder})" for lease in sweep.leases)
        console.print(
            f"{len(sweep.spared):,} more were left, because work is going on: {holders}; run again when it has ended",
            highlight=False,
            soft_wrap=True,
        )
