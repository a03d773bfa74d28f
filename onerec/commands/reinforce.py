"""`onerec reinforce`: let the generator earn rewards for what it writes (ECPO)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from onerec.console import JsonOption, RunOption, StateOption, err, out, print_json
from onerec.errors import UserError
from onerec.signals import stopping

if TYPE_CHECKING:
    from trainer.ecpo import Step
    from trainer.reinforcement import Stage


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(reinforce)


def reinforce(
    state: StateOption,
    run: RunOption,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder of the run that results; a new one.")],
    steps: Annotated[int, typer.Option(min=1, help="Steps: draw sessions, judge them, update.")] = 200,
    industrial: Annotated[
        str | None,
        typer.Option(help="Your reward: FILE.py:function or module:function; item ids of a session to a number.",
                     show_default=False),
    ] = None,
    industrial_weight: Annotated[float, typer.Option(help="Weight of your reward beside the reward model's.")] = 1.0,
    format_reward: Annotated[
        bool, typer.Option("--format/--no-format", help="Reward sessions that are legal without the trie.")
    ] = True,
    learning_rate: Annotated[float | None, typer.Option(help="Adam's; default 1e-4.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same weights.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Draw legality, reward, entropy and gradient norm to this file.")] = None,
    json: JsonOption = False,
) -> None:
    """Reinforce a run's newest checkpoint on rewards, by ECPO, jointly with next-token prediction.

    The rewards: the run's reward model, legality of what is written without the trie, and a function of yours. The result
    is a run of its own: `onerec publish` serves it, `onerec train` goes on from it. RUN2/reinforce.jsonl has a line a step.

    Example: `onerec reinforce --state state --run run --out aligned --steps 200 --industrial caps.py:author_cap`
    """
    if plot is not None and not plot.resolve().parent.is_dir():
        raise UserError(f"--plot {plot}: the folder {plot.resolve().parent} does not exist; make it first")
    if learning_rate is not None and learning_rate <= 0:
        raise UserError(f"--learning-rate {learning_rate} must be above 0")
    from trainer.ecpo import EcpoConfig
    from trainer.policy_rewards import load_function
    from trainer.reinforcement import draw_steps, reinforce_run

    function = None if industrial is None else (industrial, load_function(industrial))
    config = EcpoConfig()
    if not format_reward:
        config = msgspec.structs.replace(config, format_weight=0.0)
    if learning_rate is not None:
        config = msgspec.structs.replace(config, learning_rate=learning_rate)

    def report(step: Step) -> None:
        if not json and (step.step == 1 or step.step % 10 == 0 or step.step == steps):
            err.print(_line(step, steps), highlight=False)

    with stopping("stopping after this step; a checkpoint is written") as stop:
        stage, found = reinforce_run(
            state,
            run,
            out_dir,
            config,
            steps=steps,
            seed=seed,
            industrial=function,
            industrial_weight=industrial_weight,
            stopped=lambda: bool(stop),
            say=lambda text: err.print(text, highlight=False),
            progress=report,
        )
    if plot is not None:
        draw_steps({"format reward" if format_reward else "no format reward": found}, plot)
    if json:
        print_json(msgspec.to_builtins(stage))
    else:
        _print_summary(stage)


def _line(step: Step, steps: int) -> str:
    reward = "-" if step.reward is None else f"{step.reward:.4f}"
    return (
        f"step {step.step:,} of {steps:,}: legal {step.legal:.1%}, reward {reward}, "
        f"gradient {step.gradient:.2f}, {step.seconds:.1f} s"
    )


def _print_summary(stage: Stage) -> None:
    """First and last tenth of the stage, and what was left out."""

    def pair(values: tuple[float | None, float | None]) -> str:
        return " → ".join("-" if value is None else f"{value:.4f}" for value in values)

    out.print(f"reward of legal sessions  {pair(stage.reward)}", highlight=False)
    if stage.industrial != (None, None):
        out.print(f"your reward               {pair(stage.industrial)}", highlight=False)
    out.print(f"legal without the trie    {stage.legal[0]:.1%} → {stage.legal[1]:.1%}", highlight=False)
    levels = ", ".join(f"{first:.2f} → {last:.2f}" for first, last in zip(*stage.entropy, strict=True))
    out.print(f"entropy a level, nats     {levels}", highlight=False)
    out.print(
        f"{stage.steps:,} steps, {stage.seconds:.0f} s; left out: {stage.equal_groups:,} groups of equal rewards, "
        f"{stage.small_groups:,} with fewer than two rewarded sessions, {stage.faults:,} sessions that your reward failed "
        f"on, {stage.skipped:,} updates that were not finite",
        highlight=False,
    )
    out.print(f"checkpoint {stage.checkpoint}", highlight=False)
