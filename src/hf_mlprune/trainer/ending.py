"""The end of a run: the model is shrunk and reported, or rescued where that cannot be."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_model
from torch import nn
from transformers import PreTrainedModel, TrainerState, TrainingArguments

from ..families import head_of
from ..files import write_folder, write_json
from ..goals import is_within_target, predicted_speedup, reached
from ..modeling.pretrained import REPORT_FILE
from ..reports.report import print_end
from ..shrinking import ShrinkError, shrink
from ..state import is_attached, pruning_states
from .measuring import measured_report
from .saving import write_pruned
from .session import Session

#: Folders of models that were rescued. The underscore keeps them out of hub uploads.
UNSHRUNK, PRUNED = "_unshrunk_model", "_pruned_model"


def end_run(session: Session, args: TrainingArguments, state: TrainerState) -> None:
    """Shrink the model in place, prove it equal, write and print its report.

    Args:
        session: of the run, closed; takes the report.
        args: of the run.
        state: of the run.

    Raises:
        RuntimeError: training ended before all masks were final.
        ShrinkError: the export failed; the masked model is saved in ``output_dir``.
        Exception: what failed after that; the pruned model is saved there.
    """
    model, output_dir = session.model, Path(args.output_dir)
    states = pruning_states(model)
    settings = states[0].config
    for gate in (gate for pruning in states for gate in pruning.all_gates()):
        gate.refresh()
    if not all(pruning.is_final and is_within_target(pruning) for pruning in states):
        density = max(pruning.density() for pruning in states)
        advice = rescue(model, output_dir) if state.is_world_process_zero else ""
        raise RuntimeError(
            f"training ended at step {state.global_step} of {state.max_steps}, before pruning did: "
            f"density {density:.4f}, target {settings.goal}; resume from a checkpoint of this run, or "
            f"start a new run with a smaller max_steps; {advice}"
        )
    predicted, length, cost = predicted_speedup(states[0]), states[0].length, reached(states[0])
    calls = list(session.calls.values())
    try:
        done = shrink(model, calls)
        found = measured_report(model, session.longest, done, settings, length, predicted, cost)
        session.report = found
        session.publisher.finish(model, found, args, state)
        if state.is_world_process_zero:
            write_json(output_dir / REPORT_FILE, found.to_dict())
            print_end(found, settings)
    except BaseException as error:
        advice = rescue(model, output_dir) if state.is_world_process_zero else ""
        if isinstance(error, Exception) and is_attached(model):
            raise ShrinkError(f"the export failed: {error}; {advice}") from error
        error.add_note(advice)
        raise


def rescue(model: nn.Module, output_dir: Path) -> str:
    """Save the model of a run that cannot end as it should, and say how to go on from there.

    Args:
        model: with masks, or shrunk already.
        output_dir: of the run.

    Returns:
        A sentence for an error message; if the model could not be saved, why.
    """
    masked = is_attached(model)
    folder = output_dir / (UNSHRUNK if masked else PRUNED)
    file = folder / "model.safetensors"
    try:
        if masked and not isinstance(model, PreTrainedModel):
            write_folder(folder, lambda partial: save_model(model, str(partial / file.name)))
        else:
            write_folder(folder, lambda partial: write_pruned(model, partial))
    except Exception as error:
        return f"the model could not be saved in {folder} either: {error}"
    if not masked:
        return f"the pruned model is whole, and saved in {folder}"
    head = head_of(model)
    if head is not None:
        how = f"model = {head.auto}.from_pretrained({str(folder)!r}); shrink(model)"
    else:
        how = (
            "make the model anew; attach(model, PruningConfig.create(...)) with the settings of this run; "
            f"load_model(model, {str(file)!r}) of safetensors.torch; shrink(model)"
        )
    return f"the trained model is saved with its masks; to shrink it later: {how}"
