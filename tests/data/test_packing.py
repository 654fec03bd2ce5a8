from dataclasses import replace

import numpy as np
import pytest
import torch

from loglinear.data.corpus import split, tokenize
from loglinear.data.packing import IGNORED, EqualRows, PackedRows, pieces, pieces_by_rounds
from loglinear.data.sources import Document
from loglinear.models import ByteTokenizer
from tests.data.test_corpus import corpus_of


def rows_of(corpus, **options):
    return PackedRows(corpus, **{"seq_len": 8, "row_tokens": 16, "shuffle_seed": 0, **options})


def sequences(row):
    cuts = row["cu_seqlens"].tolist()
    return [row["input_ids"][0, low:high] for low, high in zip(cuts[:-1], cuts[1:], strict=True)]


def test_pieces_cover_every_document_in_order():
    corpus = corpus_of([20, 3, 8])
    parts = pieces(corpus, 8)
    assert (parts[:, 1] - parts[:, 0] <= 8).all()
    assert parts[0, 0] == 0 and parts[-1, 1] == 31 and np.array_equal(parts[1:, 0], parts[:-1, 1])
    assert set(corpus.offsets_D.tolist()) <= set(parts.flatten().tolist())


def test_rounds_begin_with_every_documents_first_piece():
    corpus = corpus_of([20, 3, 8])
    parts = pieces_by_rounds(corpus, 8)
    assert set(parts[:3, 0].tolist()) == set(corpus.offsets_D[:-1].tolist())
    assert sorted(map(tuple, parts.tolist())) == sorted(map(tuple, pieces(corpus, 8).tolist()))


def test_no_sequence_holds_two_documents_and_no_label_crosses():
    rows = rows_of(corpus_of([20, 3, 9, 30, 2, 17]))
    for index in range(len(rows)):
        row = rows[index]
        assert row["input_ids"].shape == row["labels"].shape == (1, 16)
        for sequence in sequences(row):
            assert len(set(sequence[sequence < 256].tolist())) <= 1
            assert len(sequence) <= 8
        starts = row["cu_seqlens"][:-1].long()
        assert (row["labels"][0, starts] == IGNORED).all()
        others = torch.ones(16, dtype=torch.bool).index_fill(0, starts, False)
        assert torch.equal(row["labels"][0, others], row["input_ids"][0, others])


def test_an_epoch_reads_every_token_once_and_epochs_differ():
    corpus = corpus_of([20, 3, 9, 16, 2, 14])  # 64 tokens: exactly four rows
    rows = rows_of(corpus, rows=8)
    epochs = [torch.cat([rows[4 * epoch + r]["input_ids"][0] for r in range(4)]) for epoch in range(2)]
    for epoch in epochs:
        assert torch.equal(epoch.sort().values, torch.from_numpy(np.sort(corpus.tokens).astype(np.int64)))
    assert not torch.equal(*epochs)


def test_jitter_gives_every_sequence_a_position_that_depends_on_seed_and_row_alone():
    corpus = corpus_of([20, 3, 9, 16, 2, 14])
    plain, rows, again = (rows_of(corpus, rows=8, **options) for options in ({}, {"jitter": 1000}, {"jitter": 1000}))
    other = rows_of(corpus, rows=8, jitter=1000, shuffle_seed=1)
    assert "initial_position" not in plain[0]
    starts = [rows[index].pop("initial_position") for index in range(8)]
    for index, start in enumerate(starts):
        assert start.dtype == torch.int64 and len(start) == len(rows[index]["cu_seqlens"]) - 1
        assert ((start >= 0) & (start < 1000)).all()
        assert torch.equal(again[index]["initial_position"], start)
        assert all(torch.equal(rows[index][name], tensor) for name, tensor in plain[index].items())
    drawn = torch.cat(starts)
    assert len(drawn.unique()) > 0.8 * len(drawn)
    assert not torch.equal(torch.cat([other[index]["initial_position"] for index in range(8)])[:8], drawn[:8])


def test_rows_depend_on_the_seed_alone_not_on_the_order_of_access():
    corpus = corpus_of([40] * 6)
    once, again = rows_of(corpus, rows=20), rows_of(corpus, rows=20)
    late = again[17]["input_ids"]
    assert torch.equal(once[17]["input_ids"], late)
    assert all(torch.equal(once[i]["input_ids"], again[i]["input_ids"]) for i in range(20))
    assert any(not torch.equal(once[i]["input_ids"], rows_of(corpus, shuffle_seed=1)[i]["input_ids"]) for i in range(5))


def test_too_little_text_for_one_batch_is_one_clear_line():
    with pytest.raises(ValueError, match="10 tokens and one batch takes 16"):
        rows_of(corpus_of([10]))


def test_small_validation_text_is_one_short_row():
    rows = rows_of(corpus_of([10]), shuffle_seed=None)
    assert len(rows) == 1 and rows[0]["input_ids"].shape == (1, 10)


def test_predicted_tokens_and_bytes_are_those_of_the_labels():
    rows = rows_of(corpus_of([20, 3, 9, 30, 2, 17]))
    for index in range(len(rows)):
        labels = rows[index]["labels"]
        labels = labels[labels != IGNORED]
        assert rows.predicted(range(index, index + 1)) == (len(labels), int((labels < 256).sum()))


def test_the_loss_counts_what_documents_say():
    text = "é one é two one"
    documents = [Document("a", text, ((2, 5), (12, 15))), Document("b", "all of it"), Document("c", "nothing", ())]
    corpus = tokenize(documents, ByteTokenizer())
    rows = rows_of(corpus, seq_len=32, row_tokens=len(corpus.tokens))
    row = rows[0]
    counted = [
        bytes(ids[(labels != IGNORED) & (ids < 256)].tolist()).decode()
        for ids, labels in zip(sequences(row), sequences({**row, "input_ids": row["labels"]}), strict=True)
    ]
    assert sorted(counted) == ["", "all of it", "oneone"]
    assert rows.predicted(range(1)) == (6 + len("all of it") + 1, 6 + len("all of it"))
    everything = tokenize([document._replace(learnt=None) for document in documents], ByteTokenizer())
    assert corpus.fingerprint != everything.fingerprint
    alone, *_ = split(tokenize(documents[:1], ByteTokenizer()), 0.2)
    assert alone.learnt.sum() == 4  # of <bos>, 17 bytes and <eos> the last three validate, "ne" among them
    train, validation = split(corpus, 0.5)
    assert train.learnt.sum() + validation.learnt.sum() == corpus.learnt.sum()


def test_equal_rows_are_the_documents_of_packed_rows_as_batches():
    corpus = corpus_of([5] * 5)
    corpus = replace(corpus, learnt=np.arange(25) % 7 != 2)
    options = dict(seq_len=5, row_tokens=10, shuffle_seed=4, rows=7)
    packed, equal = PackedRows(corpus, **options), EqualRows(corpus, **options)
    for index in range(7):
        row, batch = packed[index], equal[index]
        assert batch["input_ids"].shape == (2, 5) and set(batch) == {"input_ids", "labels"}
        assert all(torch.equal(batch[name].flatten(), row[name].flatten()) for name in batch)


def test_equal_rows_refuse_what_is_not_equal():
    options = dict(seq_len=5, row_tokens=10, shuffle_seed=0)
    with pytest.raises(ValueError, match="need 5 tokens in each, got one of 4"):
        EqualRows(corpus_of([5, 4, 5]), **options)
    with pytest.raises(ValueError, match="--batch-tokens must be a multiple of the documents' 5, got 12"):
        EqualRows(corpus_of([5] * 3), **{**options, "row_tokens": 12})
    with pytest.raises(ValueError, match="start at position 0, got a jitter of 8"):
        EqualRows(corpus_of([5] * 3), **options, jitter=8)
