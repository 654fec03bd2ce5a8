"""Every command line that a page shows, and how it is known to work.

The lines are those of blocks of code. A command in a sentence needs no entry: its options must exist. `pytest` and
`make` need none: their paths, markers and targets are looked up.
"""

SHORT = "--steps 2 --seq-len 64 --batch-tokens 128"
MQAR_IN_SECONDS = (
    "loglinear eval mqar --model attention --dim 32 --lr 1e-2 --seed 0 --length 32 --pairs 2 --examples 4000 --epochs 2"
)

# Executed in this order in one folder with ~/books and ~/letters; the flags on the right are appended, to be quick.
EXECUTED = {
    "loglinear info": "",
    "loglinear info --recipe paper_mamba2": "",
    "loglinear train --recipe demo --data stdlib --out runs/first": f"{SHORT} --eval-every 2",
    'loglinear generate --model runs/first --prompt "import "': "--max-new-tokens 5",
    "loglinear eval perplexity --model runs/first --data stdlib --out runs/first/perplexity": "--max-tokens 2000",
    "loglinear train --recipe demo --data ~/books --out runs/books": SHORT,
    "loglinear train --recipe demo --data ~/books --out runs/linear --num-levels 1 --steps 100": SHORT,
    "loglinear train --recipe demo --variant kimi_delta_attention --data ~/books --out runs/kimi": SHORT,
    "loglinear train --recipe demo --num-levels 15 --jitter 14336 --data ~/books --out runs/starts": SHORT,
    "loglinear train --resume --out runs/books": "",
    'loglinear generate --model runs/books --prompt "Once" --max-new-tokens 100': "--max-new-tokens 5",
    "loglinear generate --model runs/books --temperature 0": "--max-new-tokens 5",  # its prompt comes by a pipe
    "loglinear eval perplexity --model runs/books --data ~/letters --out runs/books/letters": "--max-tokens 2000",
    "loglinear eval perplexity --model runs/books --data ~/letters --length 65536 --out runs/books/long": (
        "--max-tokens 2000"
    ),
    "loglinear eval needle --model runs/books --data ~/letters --length 1024 --length 4096 --out runs/books/needle": (
        "--examples 1 --task single_2"
    ),
    "loglinear eval needle --model runs/books --data ~/letters --length 4096 --length 16384 --out runs/books/needle": (
        "--examples 1 --task single_2"
    ),
    'loglinear eval entropy --model runs/books --prompt "Once" --out runs/books/entropy': "--max-new-tokens 5",
    "loglinear eval membership --model runs/books --members ~/books --others ~/letters --out runs/books/membership": (
        "--max-tokens 64"
    ),
    "python -m experiments.figures.routing --model runs/books --out runs/books/routing.svg": "",
    f"{MQAR_IN_SECONDS} --out runs/mqar": "--examples 50 --epochs 1",
    f"{MQAR_IN_SECONDS} --out runs/miniature/mqar": "--examples 50 --epochs 1",
}
# Executed alone.
BENCHMARKS = {
    "loglinear bench ops --out results/ops-cpu.json": "--lengths 64 --rounds 1",
    "python -m benchmarks.decode --out results/decode-cpu.json": "--steps 1",
    "python -m benchmarks.serving --rounds 5 --tokens 48 --out results/serving-cpu.json": (
        "--rounds 1 --tokens 3 --clients 1 --clients 2 --slots 2"
    ),
}

# Executed by another test.
DEMO = "tests/cli/test_demo.py::test_demo_writes_everything_it_promises_and_continues_a_finished_run"
SERVE = "tests/cli/test_serve.py::test_completions_are_those_of_generate"
VLLM = "tests/integrations/test_vllm_server.py::test_completions_are_those_of_generate"
CONVERT = "tests/convert/test_conversion.py::test_the_command_converts_and_says_what_it_made"
CONVERTED = "tests/training/test_start.py::test_a_run_trains_a_converted_model_and_resumes"
UPGRADE = "tests/cli/test_upgrade.py::test_upgrade_writes_a_folder_with_the_same_logits"
START = "tests/training/test_start.py::test_the_command_trains_a_folder"
UPGRADED = "tests/cli/test_upgrade.py::test_the_commands_take_an_upgraded_folder"
NEEDLE = "tests/experiments/test_needle.py::test_pieces_give_what_one_call_gives"
LONG_TEXT = "tests/experiments/test_long_text.py::test_both_lengths_are_evaluated_on_the_same_text"
CAPACITY = "tests/experiments/test_capacity.py::test_a_miniature_memorises_and_pieces_give_what_one_call_gives"
PRETRAINED = "tests/experiments/test_rl.py::test_the_trained_model_is_tested"
ROUNDS = "tests/experiments/test_rl.py::test_pieces_give_what_one_call_gives"
SCORES = "tests/experiments/test_rl.py::test_the_table_has_means_and_deviations"
DESCENT = (
    "tests/experiments/test_descent.py"
    "::test_a_miniature_measures_memory_and_membership_and_pieces_give_what_one_call_gives"
)
DESCENTS = "tests/experiments/test_descent.py::test_the_tables_have_ratios_scores_and_laws"
CAPACITIES = "tests/experiments/test_capacity.py::test_the_tables_have_means_ranges_and_marks"
MINIATURE = "tests/experiments/test_corpus.py::test_the_miniature_is_made_of_the_standard_library_without_a_download"
SHARDED = "tests/distributed/test_launched_runs.py::test_fsdp2_has_the_losses_of_one_process_and_resumes_in_any_number"
SLICED = "tests/distributed/test_launched_runs.py::test_replicas_and_slices_have_the_losses_of_one_process"
TESTED = {
    "loglinear train --recipe small --data ~/books --out runs/replicas": SLICED,
    "loglinear train --recipe small --data ~/books --out runs/fsdp2": SHARDED,
    "loglinear train --resume --out runs/fsdp2": SHARDED,
    "loglinear train --recipe small --num-levels 18 --seq-len 131072 --micro-batch-tokens 131072 --context-parallel 2 "
    "--data ~/books --out runs/long": SLICED,
    "loglinear demo --seed 1 --out runs/demo-seed1": DEMO,
    "loglinear convert --from state-spaces mamba2-130m runs/mamba2-130m": CONVERT,
    "loglinear convert --from transformers mamba2 runs/mamba2": CONVERT,
    "loglinear convert --from fla gated_deltanet runs/gated_deltanet": CONVERT,
    "loglinear convert --from authors hattention runs/hattention": CONVERT,
    "loglinear convert --from transformers --num-levels 1 mamba2 runs/linear": CONVERT,
    "loglinear convert --from transformers --num-levels 8 --finest-block 64 --routing gram mamba2 runs/routed": CONVERT,
    "loglinear upgrade --model qwen3-next --out runs/qwen3-next --num-levels 15": UPGRADE,
    "loglinear train --recipe small --model runs/mamba2 --data ~/books --out runs/trained": CONVERTED,
    "loglinear train --recipe demo --model runs/qwen3-next --data ~/books --out runs/trained": START,
    'loglinear generate --model runs/trained --prompt "Once"': UPGRADED,
    "loglinear serve --model runs/books": SERVE,
    "loglinear serve --model runs/books --port 8000": SERVE,
    "loglinear serve --model runs/books --engine vllm --port 8000": VLLM,
    "python -m experiments.figures": "tests/documents/test_figures.py::test_figures_are_those_of_the_results",
    "python -m experiments.figures --results results/miniature": (
        "tests/experiments/test_long_text.py::test_figures_and_table_are_drawn_of_the_results_that_there_are"
    ),
    "python -m experiments.needle rates runs/needle/rates": (
        "tests/experiments/test_needle.py::test_a_search_shows_the_rate_of_least_validation_loss"
    ),
    "python -m experiments.needle prepare": (
        "tests/experiments/test_needle.py::test_prepared_tokenizer_keeps_every_byte_and_cuts_digits_in_threes"
    ),
    "python -m experiments.needle run --kind log_linear --out runs/miniature/needle --miniature --examples 4": NEEDLE,
    "python -m experiments.capacity run --kind linear --size 100k --load 1 --out runs/miniature/capacity --miniature": (
        CAPACITY
    ),
    "python -m experiments.capacity show": CAPACITIES,
    "python -m experiments.capacity show --results results/miniature": CAPACITIES,
    "python -m experiments.rl pretrain --kind linear --out runs/miniature/rl --miniature": PRETRAINED,
    "python -m experiments.rl run --kind linear --tokens top20 --base runs/miniature/rl --out runs/miniature/rl-top20 "
    "--miniature": ROUNDS,
    "python -m experiments.rl show": SCORES,
    "python -m experiments.rl show --results results/miniature": SCORES,
    "python -m experiments.descent reference --kind linear --out runs/miniature/reference --miniature": DESCENT,
    "python -m experiments.descent run --kind linear --load 1 --reference runs/miniature/reference "
    "--out runs/miniature/descent --miniature": DESCENT,
    "python -m experiments.descent show": DESCENTS,
    "python -m experiments.descent show --results results/miniature": DESCENTS,
    "python -m experiments.long_text prepare --miniature": MINIATURE,
    "python -m experiments.long_text run --kind log_linear --out runs/miniature/log_linear --miniature": LONG_TEXT,
    "python -m experiments.ablations run --choice unit --out runs/miniature/unit --miniature": LONG_TEXT,
}

# Not executed here, for the reason above: the command, its options and their values are read.
READ = {
    "a GPU": [
        "loglinear train --recipe small --compile --data ~/books --out runs/small",
        "python -m benchmarks.decode --device cuda --out results/decode-h100.json",
        "python -m benchmarks.memory --out results/memory-h100.json",
        "python -m benchmarks.serving --device cuda --recipe paper_mamba2 --slots 64 --out results/serving-gpu.json",
        "python -m benchmarks.ops --device cuda --out results/ops-h100.json",
        'python -m benchmarks.ops --device cuda --shape "delta rule" --out results/ops-delta-h100.json',
        'python -m benchmarks.ops --device cuda --shape "delta rule, one sequence"',
        'python -m benchmarks.ops --device cuda --shape "delta rule, the paper\'s heads" '
        "--lengths 16384 --lengths 65536 --lengths 131072",
        "python -m benchmarks.training --lengths 16384 --lengths 4096 --out results/training-short.json",
        "python -m benchmarks.training --lengths 65536 --lengths 131072 --out results/training-long.json",
        "loglinear eval mqar --out runs/mqar --minutes 9",
        "loglinear eval mqar --model log_linear_mamba2 --dim 64 --out runs/mqar --minutes 9",
        "loglinear eval mqar --model log_linear_mamba2 --dim 64 --lr 1e-2 --seed 0 --out runs/mqar",
        "loglinear eval mqar --model log_linear_mamba2_unit --dim 32 --dim 64 --out runs/mqar",
        "loglinear eval mqar --task jittered --protocol zoology --model mamba2_equal_bytes --out runs/jittered",
        "loglinear eval mqar --protocol zoology --epochs 6 --compile --model mamba2 --model log_linear_mamba2 "
        "--model mamba2_equal_bytes --out runs/zoology --minutes 9",
        "python -m experiments.ablations run --choice CHOICE --out runs/ablations/CHOICE --minutes 9",
        "python -m experiments.ablations run --choice unit --out runs/ablations/unit --minutes 9",
        "python -m experiments.capacity run --kind transformer --size 100k --load 2 --dtype bfloat16 "
        "--out runs/capacity/transformer-100k-2 --minutes 9",
        "python -m experiments.descent reference --kind transformer --out runs/descent/transformer-reference "
        "--minutes 9",
        "python -m experiments.descent run --kind transformer --load 1 --reference runs/descent/transformer-reference "
        "--out runs/descent/transformer-1 --minutes 9",
        "python -m experiments.long_text run --kind linear_states4 --seed 1 --out runs/long_text/linear_states4-1 "
        "--minutes 9",
        "python -m experiments.long_text run --kind log_linear --out runs/long_text/log_linear --minutes 9",
        "python -m experiments.rl pretrain --kind log_linear --seed 0 --out runs/rl/log_linear-0 --minutes 9",
        "python -m experiments.rl run --kind log_linear --seed 0 --tokens top20 --base runs/rl/log_linear-0 "
        "--out runs/rl/log_linear-0-top20 --minutes 9",
        "python -m experiments.needle run --kind log_linear --out runs/needle/log_linear --minutes 9 "
        "--data data/long_text/validation.jsonl.zst",
        "python -m experiments.needle run --kind linear --seed 10 --learning-rate 1e-3 --steps 2000 --examples 10 "
        "--out runs/needle/rates/1e-3/linear --results runs/needle/rates/1e-3 "
        "--data data/long_text/validation.jsonl.zst",
        "python -m experiments.needle run --kind linear --seed 1 --out runs/needle/linear-1 "
        "--minutes 8 --data data/long_text/validation.jsonl.zst",
        "python -m experiments.needle run --kind transformer --embedding-range 0.02 "
        "--out runs/needle/small --minutes 8 --data data/long_text/validation.jsonl.zst",
        "python -m experiments.needle run --kind linear_states4 --seed 0 --out runs/needle/linear_states4-0 "
        "--data data/long_text/validation.jsonl.zst",
        "python -m experiments.upgrade run --out runs/upgrade --data data/long_text/validation.jsonl.zst",
        "python -m experiments.upgrade run --base runs/needle/linear_states4-0 --out runs/upgrade-needle "
        "--data data/long_text/validation.jsonl.zst",
    ],
    "330 MB of Debian packages": [
        "python -m experiments.long_text prepare",
    ],
    "vLLM": [
        "python -m benchmarks.serving_vllm --prompt 1024 --rounds 2 --out results/serving-vllm-cpu.json",
        "python -m benchmarks.serving_vllm --prompt 16384 --clients 1 --clients 4 --clients 16 --rounds 1 "
        "--out results/serving-vllm-long-cpu.json",
    ],
    "triton without its interpreter": ["python -m benchmarks.resources"],
}
