"""Lines that a run says."""

from pefomed_ray.cli.training import resumed_lines, start_line


def test_what_learns_is_one_line_with_modules_and_counts() -> None:
    learning = {
        "language_model": "language_model",
        "modules": 64,
        "targets": ["q_proj", "v_proj"],
        "trainable_parameters": 56_627_200,
        "parameters": 7_800_000_000,
    }
    line = (
        "LoRA on 64 modules of language_model (q_proj, v_proj); 56,627,200 of 7,800,000,000 parameters learn (0.73 %)"
    )
    alone = {"strategy": "alone", "fsdp_bytes": 0, "ddp_bytes": 0}
    assert start_line(learning | {"traffic": alone}) == line
    two = {"strategy": "ddp", "fsdp_bytes": 57 * 2**30, "ddp_bytes": 2**30}
    assert start_line(learning | {"traffic": two}) == (
        f"{line}\nstrategy ddp: a step sends 57.0000 GiB a worker under fsdp, 1.0000 under ddp (57 times fewer)"
    )


def test_where_a_run_goes_on_and_what_it_passed_over() -> None:
    begun = {"step": 0, "passed_over": [], "micro_batch_size": 4}
    assert resumed_lines(begun) == []
    damaged = {"step": 3, "passed_over": ["00000006 (state.safetensors does not match its sha256)"]}
    assert resumed_lines(begun | damaged) == [
        "passed over a damaged checkpoint: 00000006 (state.safetensors does not match its sha256)",
        "going on after step 3, 4 rows a micro-batch",
    ]
