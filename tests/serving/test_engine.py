"""Sequences that share an engine: each is the one that `generate` returns alone."""

import threading
import time
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import partial

import pytest
import torch
from transformers import StoppingCriteria

from loglinear.models import LogLinearCache, LogLinearForCausalLM, set_decode_top_k
from loglinear.serving import Engine
from loglinear.training import ByteTokenizer
from loglinear.variants import VARIANTS
from tests.models.tiny_models import FULL, HYBRID, KINDS, LINEAR, ROUTED, TRANSFORMER, tiny_config

LENGTHS = [1, 2, 4, 5, 9, 17, 31, 64]


def make(**options):
    torch.manual_seed(0)
    return LogLinearForCausalLM(tiny_config(**options)).double().eval()


def prompt(length, seed=1):
    return torch.randint(3, 40, (1, length), generator=torch.Generator().manual_seed(seed))


def all_at_once(calls):
    """Run each call in a thread of its own, and return the results in order."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(60) for future in [pool.submit(call) for call in calls]]


def check_equal_to_generate(model, engine, requests):
    alone = [model.generate(ids, **arguments) for ids, arguments in requests]
    found = all_at_once([partial(engine.generate, ids, **arguments) for ids, arguments in requests])
    for number, (one, other) in enumerate(zip(alone, found, strict=True)):
        assert torch.equal(one, other), f"request {number}"


def mixed_requests():
    """Requests of different lengths, more than there are rows; some end at their end-of-sequence token."""
    return [
        (prompt(length, seed=length), dict(max_new_tokens=3 + 7 * number % 25, do_sample=False))
        for number, length in enumerate(LENGTHS)
    ]


@KINDS
def test_every_request_gets_the_tokens_of_generate(options):
    """Requests join and leave, prompts are read in odd pieces, and rows cross chunks at places of their own."""
    model = make(**options)
    engine = Engine(model, slots=3, prefill_tokens=5)
    check_equal_to_generate(model, engine, mixed_requests())
    while engine._is_running:  # the thread looks for work once more
        time.sleep(0.001)
    assert len(engine.slots) == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_gets_the_tokens_of_generate(variant):
    model = make(variant=variant)
    check_equal_to_generate(model, Engine(model, slots=4), mixed_requests())


def test_sixty_four_requests_join_and_leave():
    model = make(variant="gated_delta_net")
    lengths = torch.randint(1, 30, (64, 2), generator=torch.Generator().manual_seed(4)).tolist()
    requests = [(prompt(length, seed), dict(max_new_tokens=tokens)) for seed, (length, tokens) in enumerate(lengths)]
    check_equal_to_generate(model, Engine(model, slots=16, prefill_tokens=33), requests)


def test_keys_and_values_grow_with_the_longest_row():
    model = make(**HYBRID)
    requests = [(prompt(length, length), dict(max_new_tokens=12)) for length in (300, 7, 250, 520)]
    check_equal_to_generate(model, Engine(model, slots=2, prefill_tokens=100), requests)


def test_the_memory_of_a_long_row_is_given_back_while_another_goes_on():
    model, longest = make(**HYBRID), []
    engine = Engine(model, slots=2, prefill_tokens=2000, prefix_bytes=0)
    step = engine.slots.step
    engine.slots.step = lambda tokens: longest.append(engine.slots.nbytes) or step(tokens)
    check_equal_to_generate(
        model, engine, [(prompt(1500, 1), dict(max_new_tokens=3)), (prompt(30, 2), dict(max_new_tokens=40))]
    )
    assert longest[-1] < max(longest) / 2 and engine.slots.nbytes < max(longest) / 2


def test_settings_of_generate_belong_to_each_request():
    model = make()
    settings = [
        dict(sequence_bias=[[[7], 5.0]]),
        dict(repetition_penalty=1.5),
        dict(eos_token_id=[int(model.generate(prompt(5), max_new_tokens=9)[0, 12])]),
        dict(min_new_tokens=10, eos_token_id=list(range(3, 40))),
        {},
    ]
    requests = [(prompt(5), dict(max_new_tokens=20, **more)) for more in settings]
    check_equal_to_generate(model, Engine(model), requests)


def test_a_seed_counts_whatever_others_sample():
    model = make()
    engine = Engine(model, slots=3)
    sampling = dict(do_sample=True, temperature=0.9, top_k=0, top_p=0.9, max_new_tokens=30)
    torch.manual_seed(5)
    alone = model.generate(prompt(6), **sampling)

    def seeded(seed):
        return engine.generate(prompt(6), generator=torch.Generator().manual_seed(seed), **sampling)

    found = all_at_once([partial(seeded, seed) for seed in (5, 6, 7, 5, 8)])
    assert torch.equal(found[0], alone) and torch.equal(found[3], alone)
    assert len({tuple(ids[0].tolist()) for ids in found}) == 4
    torch.manual_seed(1)
    unseeded = [engine.generate(prompt(6), **sampling) for _ in range(2)]
    torch.manual_seed(1)
    again = engine.generate(prompt(6), **sampling)
    assert torch.equal(unseeded[0], again) and not torch.equal(unseeded[0], unseeded[1])


def test_stop_strings_end_an_answer():
    ids, bias = torch.tensor([list(b"line 1")]), dict(sequence_bias=[[[ord("q")], 100.0]], max_new_tokens=20)
    stopped = Engine(make(vocab_size=264)).generate(ids, stop_strings="qqq", tokenizer=ByteTokenizer(), **bias)
    assert bytes(stopped[0].tolist()) == b"line 1qqq"


class Collector:
    def __init__(self):
        self.tokens, self.ended = [], 0

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended += 1


def test_a_streamer_gets_every_token_as_it_comes():
    model = make()
    engine, streamers = Engine(model, slots=2), [Collector() for _ in range(4)]
    found = all_at_once(
        [partial(engine.generate, prompt(5, n), streamer=s, max_new_tokens=9) for n, s in enumerate(streamers)]
    )
    assert [s.tokens for s in streamers] == [ids[0].tolist() for ids in found]
    assert [s.ended for s in streamers] == [1] * 4


class Ends(StoppingCriteria):
    """An error after some tokens."""

    def __init__(self, after):
        self.after = after

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] >= self.after:
            raise InterruptedError("the client has left")
        return torch.zeros(1, dtype=torch.bool)


def test_a_request_that_fails_leaves_the_others_alone():
    model = make()
    engine = Engine(model, slots=3)
    neighbours = [(prompt(length, length), dict(max_new_tokens=30)) for length in (4, 9, 11, 20)]
    alone = [model.generate(ids, **arguments) for ids, arguments in neighbours]

    def fails():
        with pytest.raises(InterruptedError, match="the client has left"):
            engine.generate(prompt(5), max_new_tokens=50, stopping_criteria=[Ends(9)])

    def refused():
        def check():
            raise TimeoutError("too long")

        with pytest.raises(TimeoutError, match="too long"):
            engine.generate(prompt(5), max_new_tokens=50, before_work=check)

    calls = [partial(engine.generate, ids, **arguments) for ids, arguments in neighbours]
    found = all_at_once([calls[0], fails, calls[1], refused, *calls[2:]])
    for one, other in zip(alone, (found[0], found[2], *found[4:]), strict=True):
        assert torch.equal(one, other)


def test_a_token_outside_the_vocabulary_leaves_the_others_alone():
    model = make()
    engine, ids = Engine(model, slots=2), torch.tensor([[5, 6, model.config.vocab_size]])
    alone = model.generate(prompt(4), max_new_tokens=60)

    def fails():
        most = model.config.vocab_size - 1
        for wrong in (ids, -ids):
            with pytest.raises(ValueError, match=f"input_ids must be tokens from 0 to {most}, got"):
                engine.generate(wrong, max_new_tokens=5)

    found = all_at_once([partial(engine.generate, prompt(4), max_new_tokens=60), fails])
    assert torch.equal(found[0], alone)


@pytest.mark.parametrize("options", [HYBRID, TRANSFORMER, {}])
def test_a_row_keeps_nothing_of_a_sequence_that_overflowed(options):
    model = make(**options)
    engine = Engine(model, slots=2)
    for layer in engine.slots.layers:
        for part in layer.tensors:
            part.fill_(torch.nan) if part.is_floating_point() else None
    check_equal_to_generate(model, engine, [(prompt(length, length), dict(max_new_tokens=9)) for length in (5, 30, 1)])


def test_a_call_that_waits_for_a_row_can_be_cancelled():
    model = make()
    engine, future, begun = Engine(model, slots=1), Future(), threading.Event()
    engine_thread = dict(before_work=lambda: begun.set() or gate.wait(10) and None)
    gate = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(partial(engine.generate, prompt(5), max_new_tokens=5, **engine_thread))
        begun.wait(10)
        second = pool.submit(partial(engine.generate, prompt(6), max_new_tokens=5, future=future))
        while not engine._waiting:
            time.sleep(0.001)
        assert future.cancel()
        with pytest.raises(CancelledError):
            second.result(10)
        assert not engine._waiting
        gate.set()
        assert torch.equal(first.result(10), model.generate(prompt(5), max_new_tokens=5))


def test_a_thread_that_does_not_start_holds_no_later_call(monkeypatch):
    model = make()
    engine = Engine(model)

    def full(self):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", full)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            engine.generate(prompt(5), max_new_tokens=5)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(partial(engine.generate, prompt(5), max_new_tokens=5)).result(30)
    assert torch.equal(found, model.generate(prompt(5), max_new_tokens=5))


def test_a_failure_of_the_model_ends_the_rows_and_the_engine_goes_on(monkeypatch):
    model = make()
    engine = Engine(model)
    with monkeypatch.context() as patched:
        patched.setattr(engine.slots, "step", lambda tokens: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.generate(prompt(5), max_new_tokens=5)
    assert torch.equal(engine.generate(prompt(5), max_new_tokens=5), model.generate(prompt(5), max_new_tokens=5))


def test_a_short_prompt_does_not_wait_for_a_long_one():
    """Pieces are read in turn, and those who came first get the first rows."""
    model, ended = make(), []
    engine = Engine(model, slots=3, prefill_tokens=8, prefix_bytes=0)
    gate = threading.Event()

    def run(name, length, tokens):
        engine.generate(prompt(length), max_new_tokens=tokens, before_work=lambda: gate.wait(10) and None)
        ended.append(name)

    threads = []
    for number, (name, length, tokens) in enumerate(
        [("long", 600, 1), ("short", 5, 3), ("next", 5, 3), ("last", 5, 3)]
    ):
        threads.append(threading.Thread(target=run, args=(name, length, tokens)))
        threads[-1].start()
        while len(engine._waiting) + len(engine._reading) + (number == 0) < number:
            time.sleep(0.001)
        time.sleep(0.02)
    gate.set()
    [thread.join() for thread in threads]
    assert ended.index("short") < ended.index("last") and ended[-1] == "long"


@pytest.mark.parametrize("options", [{}, ROUTED, HYBRID, TRANSFORMER, {"layer_types": [FULL, LINEAR]}])
def test_a_repeated_prefix_is_read_once(options, monkeypatch):
    model = make(**options)
    engine, read = Engine(model, prefill_tokens=50), []
    forward = model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda **inputs: read.append(inputs["input_ids"].shape[1]) or forward(**inputs)
    )

    def check(ids, expected):
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20)
        read.clear()
        assert torch.equal(engine.generate(ids, max_new_tokens=20), alone)
        assert read == expected
        return alone

    first = prompt(201, 1)
    answer = check(first, [50, 50, 50, 50])
    check(first, [])
    check(torch.cat([answer, prompt(8, 2)], 1), [8])  # the next turn of a chat: only its last old token is new
    system = torch.cat([first[:, :120], prompt(41, 3)], 1)
    check(system, [50, 50, 20, 40])  # stores the state where it leaves the first prompt
    check(torch.cat([first[:, :120], prompt(31, 4)], 1), [30])


def test_stored_states_are_bounded():
    model = make()
    one = Engine(model, slots=1)
    one.generate(prompt(9), max_new_tokens=2)
    assert len(one.prefixes) == 2
    size = one.prefixes.nbytes // 2
    engine = Engine(model, slots=2, prefix_bytes=5 * size)
    for seed in range(9):
        ids = prompt(9, seed)
        assert torch.equal(engine.generate(ids, max_new_tokens=2), model.generate(ids, max_new_tokens=2))
        assert engine.prefixes.nbytes <= 5 * size
    assert len(engine.prefixes) == 4
    nothing = Engine(model, prefix_bytes=0)
    nothing.generate(prompt(9), max_new_tokens=2)
    assert len(nothing.prefixes) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_beams=2), "num_beams must be 1 in the engine, got 2"),
        (dict(do_sample=True, num_return_sequences=2), "num_return_sequences must be 1 in the engine, got 2"),
        (dict(return_dict_in_generate=True), "return_dict_in_generate must be False in the engine, got True"),
        (dict(attention_mask=torch.tensor([[0, 1, 1, 1, 1]])), "attention_mask must be left out in the engine"),
        (dict(cu_seqlens=torch.tensor([0, 2, 5])), "cu_seqlens must be left out in the engine"),
        (dict(position_ids=torch.tensor([[0, 1, 0, 1, 2]])), "position_ids must be left out in the engine"),
        (dict(labels=prompt(5)), "labels must be left out in the engine"),
        (dict(dola_layers="low"), "dola_layers must be None in the engine, got low"),
        (dict(penalty_alpha=0.5), "penalty_alpha must be None in the engine, got 0.5"),
    ],
)
def test_what_a_row_cannot_have_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Engine(make()).generate(prompt(5), max_new_tokens=3, **arguments)


def test_a_batch_and_a_cache_are_refused():
    model = make()
    engine, cache = Engine(model), LogLinearCache(model.config)
    with pytest.raises(ValueError, match=r"input_ids must be one sequence \[1, T\] with a token, got shape \[2, 5\]"):
        engine.generate(prompt(5).repeat(2, 1), max_new_tokens=3)
    model(prompt(4), past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values must be left out in the engine"):
        engine.generate(prompt(5), max_new_tokens=3, past_key_values=cache)


def test_few_buckets_are_refused():
    """A prompt reads all buckets, and its last token is a step here."""
    model = make(**ROUTED)
    engine = Engine(model)
    set_decode_top_k(model, 2)
    for refused in (partial(engine.generate, prompt(5)), partial(Engine, model)):
        with pytest.raises(ValueError, match="decode_top_k must be None in the engine"):
            refused()


def test_other_models_and_numbers_are_refused():
    with pytest.raises(ValueError, match="model must be a LogLinearForCausalLM, got Linear"):
        Engine(torch.nn.Linear(2, 2))
    for name in ("slots", "prefill_tokens", "prefix_bytes"):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got -1"):
            Engine(make(), **{name: -1})


def test_an_interrupted_call_frees_its_row():
    model = make()
    engine, begun = Engine(model, slots=1), threading.Event()

    class Interrupts:
        def put(self, value):
            begun.set()

        def end(self):
            pass

    endless = dict(max_new_tokens=100_000, eos_token_id=None)
    results = []

    def call():
        try:
            engine.generate(prompt(5), streamer=Interrupts(), **endless)
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    begun.wait(10)
    while not engine._rows:
        time.sleep(0.001)
    engine._rows[0].future.cancel()  # as an exception in the waiting thread does
    thread.join(10)
    assert len(results) == 1
    assert torch.equal(engine.generate(prompt(5), max_new_tokens=5), model.generate(prompt(5), max_new_tokens=5))
