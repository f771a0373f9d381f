"""The commands, in the order in which one uses them: what each does, an example, and what comes next."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guide:
    """What a user is told of a command.

    Attributes:
        does: What it does, in a sentence.
        example: Arguments to call it with. Those with configs of SmolLM2's work one after the other.
        then: What comes next.
    """

    does: str
    example: str
    then: str


COMMANDS = {
    "fetch": Guide(
        does="Fetch the files of a preset that does not come from the Hugging Face hub.",
        example="valueeval data/valueeval",
        then="extract, with the lines that it prints in the config",
    ),
    "plan": Guide(
        does="Say what an extraction will cost: memory, time, disk and input. Takes its config.",
        example="--config configs/extract/smollm2.yaml --devices 1 --memory 16GiB",
        then="extract, on devices that the plan fits",
    ),
    "extract": Guide(
        does="Find the exemplars of every neuron of a model, in one pass over a corpus, into a Zarr store.",
        example="--config configs/extract/smollm2.yaml",
        then="show a neuron, view them all, or explain them; merge the stores of slices of a corpus",
    ),
    "merge": Guide(
        does="Merge stores of runs over slices of a corpus into that of a run over all of it.",
        example="runs/all runs/slice-0 runs/slice-1",
        then="what comes after extract",
    ),
    "show": Guide(
        does="Show one neuron's exemplars in the terminal, the activating tokens highlighted.",
        example="runs/smollm2 --layer 21 --neuron 1373",
        then="explain what neurons respond to",
    ),
    "explain": Guide(
        does="Say in words what neurons respond to, from the exemplars in a store.",
        example="--config configs/explain/token_table.yaml",
        then="score the explanations, by a simulator that exists or by one that you finetune",
    ),
    "finetune": Guide(
        does="Train a simulator, which predicts activations, on a store and its explanations.",
        example="--config configs/finetune/smollm2.yaml",
        then="score, with the simulator that it leaves",
    ),
    "score": Guide(
        does="Score explanations by how well the activations simulated from them agree with the real ones.",
        example="--config configs/score/first_look.yaml",
        then="view neurons with their explanations and scores",
    ),
    "view": Guide(
        does="Look at a run's neurons in a browser: serve pages to this machine alone, or write them.",
        example="runs/smollm2",
        then="export what others are to have",
    ),
    "export": Guide(
        does="Write a store, or its explanations, in the form of another tool.",
        example="runs/smollm2 exported --format parquet",
        then="the other tool; its data come back by ingest",
    ),
    "ingest": Guide(
        does="Make a store of what other tools have left. What they did not record is not made up: the store "
        "says what is not known.",
        example="their/neurons runs/theirs",
        then="show, view, explain and score, as after extract",
    ),
}

EXIT_STATUSES = {
    0: "done",
    1: "a mistake of jaxplain's own, with a traceback: please report it",
    2: "something to put right, said in one sentence; nothing that was saved is lost",
    75: "stopped by SIGTERM, all saved: the same command goes on",
    130: "stopped by Ctrl-C (view, which that is the way to end, has 0)",
    141: "whoever read the output, such as head, had enough",
}


def program(command: str) -> str:
    """How a command is called."""
    return f"python -m jaxplain.{command}"


def epilog(command: str) -> str:
    """What the help of a command ends with."""
    guide = COMMANDS[command]
    return "\n".join(
        [
            "example:",
            f"  {program(command)} {guide.example}",
            f"then: {guide.then}",
            "",
            *_statuses(),
        ]
    )


def overview() -> str:
    """All commands, and what comes next after each."""
    lines = ["what every neuron of a language model responds to", ""]
    for command, guide in COMMANDS.items():
        lines += [f"{command:<9} {guide.does}", f"{'':9} $ {program(command)} {guide.example}"]
        lines += [f"{'':9} then: {guide.then}", ""]
    lines += ["Every command has --help, --quiet, --json and --traceback.", "", *_statuses()]
    return "\n".join(lines)


def _statuses() -> list[str]:
    return ["exit status:", *(f"  {status:<4}{meaning}" for status, meaning in EXIT_STATUSES.items())]
