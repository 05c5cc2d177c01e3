"""`pefomed-ray judge`: a language model says which answers are right, or how good reports are."""

from typing import TYPE_CHECKING, Annotated

import typer

from pefomed_ray.cli.console import exits_with_code, finish, percent, say

if TYPE_CHECKING:
    from pefomed_ray.config.schema import JudgeConfig
    from pefomed_ray.evaluation.judge.budget import Estimate


@exits_with_code
def judge(
    predictions: Annotated[str, typer.Argument(help="JSONL file, as `evaluate` writes it.")],
    task: Annotated[str, typer.Option(help="vqa (0 or 1), report or caption (0 to 4).")],
    output: Annotated[str, typer.Option(help="Folder for verdicts and metrics; the same one goes on.")],
    options: Annotated[
        list[str] | None, typer.Argument(help="key=value of the judge: model=NAME base_url=URL cap_usd=5 ...")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask about the cost.")] = False,
    json: Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")] = False,
) -> None:
    """Have a language model judge predictions, over any OpenAI-compatible endpoint; flagged where it can be fooled."""
    from pefomed_ray.artifacts.storage import local_path
    from pefomed_ray.cli.options import judge_config, task_named

    source, target, kind, config = local_path(predictions), local_path(output), task_named(task), judge_config(options)
    from pefomed_ray.cli.progress import bar
    from pefomed_ray.evaluation.judge.files import judge_file

    with bar("judging", "questions") as on_progress:
        judged = judge_file(source, kind, config, target, lambda cost: _accept(cost, config, yes=yes), on_progress)
    result = judged.result
    for name, metric in result.metrics.items():
        interval = " to ".join(map(percent, metric["ci95"])) if metric["ci95"] else "-"
        say(f"{name}: {percent(metric['value'])} ({interval}), n {metric['n']}, unscored {metric['unscored']}")
    for flag in result.flags:
        say(f"flagged: {flag}")
    finish(
        {
            "judgements": str(judged.judgements),
            "metrics": str(judged.metrics),
            **result.metrics,
            "flagged": result.flagged,
            "flags": list(result.flags),
            "usage": result.usage,
        },
        as_json=json,
    )


def _accept(cost: "Estimate", config: "JudgeConfig", *, yes: bool) -> None:
    """Say what it may cost; above the limit, or where nobody knows, a person at a terminal is asked."""
    from pefomed_ray.cli.limits import accept

    if cost.cost_usd is not None:
        price, is_dear = f"${cost.cost_usd:,.2f} at most", cost.cost_usd > config.limit_usd
        why = f"over limit_usd={config.limit_usd:g}"
    else:
        price, is_dear = ("on machines of your own" if config.local else "at an unknown price"), not config.local
        why = "for want of price_in_usd and price_out_usd"
    amount = (
        f"{cost.calls:,} questions of about {cost.prompt_tokens:,} tokens, replies of {cost.completion_tokens:,} at "
        f"most, {price}"
    )
    say(f"to be asked: {amount}")
    if cost.calls and is_dear and not yes:
        accept("judging", f"{amount}, {why}", "ask them")
