"""`run_batch`: a file of prompts in, a file of answers out, nothing lost."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jrope.batch.answering import BatchSummary, Embed, Engine, Progress, Run
from jrope.batch.journal import JsonLines, put_in_order
from jrope.batch.manifest import Manifest
from jrope.batch.neighbours import Neighbours
from jrope.batch.parquet import ParquetParts
from jrope.batch.rows import BatchSettings
from jrope.batch.source import PARQUET, Source
from jrope.errors import JropeError
from jrope.hf.folders import PathLike


def run_batch(
    engine: Engine,
    input: PathLike,
    output: PathLike,
    settings: BatchSettings,
    *,
    shard: tuple[int, int] = (0, 1),
    fingerprint: Mapping[str, Any] | None = None,
    embed: Embed | None = None,
    in_order: bool = False,
    interrupted: Callable[[], bool] = lambda: False,
    progress: Progress = lambda _: None,
) -> BatchSummary:
    """Answer every row of a file that has no answer yet.

    A row is done when its answer is on the disk.  After a kill, a power cut or an error
    the same call goes on with the rows that are not done, and tries again those that
    failed; in the end every row has one record, whatever came in between.

    Args:
      engine: generates.
      input: rows as JSON lines, or Parquet by its name's end: plain ones, or those of
        OpenAI's batch files.
      output: JSON lines, or a folder of Parquet files by its name's end, in the order
        in which rows finish.
      settings: what rows share.
      shard: (i, n): only the lines whose number, from 0, is i modulo n.
      fingerprint: what else the answers depend on, such as a hash of the weights; an
        output begun with another one is refused.
      embed: ids of texts -> their vectors [n, D], such as an `Embedder`; None: rows of
        `/v1/embeddings` fail.
      in_order: when all is done, sort the output as the input is.
      interrupted: asked after every chunk; once true, rows that are not finished are
        left for the next run.
      progress: told after every record.

    Raises:
      JropeError: before anything is generated: a custom_id given twice, an output of
        other settings or rows, or one that another process writes to; later: a full
        disk, or an input that changed.
    """
    source, output = Source(Path(input), *shard), Path(output)
    if (parquet := output.suffix == PARQUET) and in_order:
        raise JropeError(f"{output}: in_order is for JSON lines; sort after reading it")
    if output.exists() and not (output.is_file() or output.is_dir()):
        why = "it is no regular file, which answers are read back from"
        raise JropeError(f"{output}: {why}; choose another output")
    index = source.index()
    with Manifest(
        output, _fingerprint(source, settings, fingerprint or {})
    ) as manifest:
        settings = replace(settings, created=manifest.created)
        records = ParquetParts(output, index) if parquet else JsonLines(output, index)
        try:
            how = interrupted, progress, embed, Neighbours(settings)
            run = Run(source, settings, index, records, *how)
            run.drain(engine)
        finally:
            records.close()
        if in_order and not run.summary.interrupted:
            put_in_order(output, (line.id for line in source.mine()))
    return run.summary


def _fingerprint(
    source: Source, settings: BatchSettings, more: Mapping[str, Any]
) -> dict[str, Any]:
    config = settings.config
    return {
        "jrope": version("jrope"),
        "model": settings.model,
        **more,
        "shard": f"{source.shard}/{source.shards}",
        **{f"default {n}": x for n, x in asdict(settings.sampler).items()},
        **{f"API's {n}": x for n, x in asdict(settings.api_sampler).items()},
        "max_new_tokens": settings.max_new_tokens,
        "max_length": settings.max_length,
        **{f.name: getattr(config, f.name) for f in fields(config)},
    }
