"""Upload an exported run to a hub: the merged checkpoint, onnx/ beside it, and the card."""

from pathlib import Path
from typing import Annotated

import typer

from pipelines.console import console, failures

BESIDE = ("spec.yaml", "verify.json", "export.json")


def push(
    run: Annotated[Path, typer.Argument(help="Folder of an exported run.", show_default=False)],
    repo: Annotated[str, typer.Argument(help="Where to: owner/name.", show_default=False)],
    private: Annotated[
        bool, typer.Option("--private", help="A repository that others don't see, if it is new.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be uploaded.")] = False,
) -> None:
    """Upload a run in one commit: merged/ at the top, onnx/ as a folder, the card, spec.yaml, verify.json, export.json.

    The folder is the one that transformers, transformers.js and text-embeddings-inference read. The account is that of
    `hf auth login`, or of HF_TOKEN.
    """
    with failures(run):
        from huggingface_hub import CommitOperationAdd, HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
        from huggingface_hub.utils import validate_repo_id

        from rewriter.errors import SubspanError, reason
        from rewriter.folder import spec_of

        spec_of(run)
        files = layout(run)
        if not files:
            raise SubspanError(f"{run} is not exported: subspan export {run}")
        try:
            validate_repo_id(repo)
        except HFValidationError as error:
            raise SubspanError(reason(error)) from error
        if repo.count("/") != 1:
            raise SubspanError(f"{repo!r} is no repository: owner/name")
        for name, file in files.items():
            console.print(f"{name}  {file.stat().st_size / 1e6:,.2f} MB", highlight=False)
        total = sum(file.stat().st_size for file in files.values()) / 1e6
        if dry_run:
            console.print(f"{len(files)} files, {total:,.1f} MB, would go to {repo}", highlight=False)
            return
        try:
            hub = HfApi()
            hub.create_repo(repo, private=private or None, exist_ok=True)
            added = [CommitOperationAdd(name, file) for name, file in files.items()]
            made = hub.create_commit(repo, added, commit_message=f"{run.resolve().name}, by subspan")
        except (OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
            raise SubspanError(f"{repo} can't be reached: {reason(error)}") from error
        console.print(f"uploaded {len(files)} files, {total:,.1f} MB: {made.commit_url}", highlight=False)


def layout(run: Path) -> dict[str, Path]:
    """Path in the repository -> file; without merged/, what lies beside the ONNX file is at the top."""
    merged, onnx = run / "merged", run / "onnx"
    files = {str(file.relative_to(merged)): file for file in sorted(merged.rglob("*")) if file.is_file()}
    for file in sorted(onnx.glob("*")):
        files.setdefault(f"onnx/{file.name}" if ".onnx" in file.suffixes else file.name, file)
    return files | {name: run / name for name in BESIDE if files and (run / name).is_file()}


if __name__ == "__main__":
    typer.run(push)
