"""The loss: on the labels only, whatever the padding, and divided by the labels of the whole step."""

import pytest
import torch
import torch.nn.functional as F
from conftest import make_batch
from transformers import GPT2Config, GPT2LMHeadModel

from tinylora_mtl.batching import collate
from tinylora_mtl.loss import forward, label_logits, label_loss


def test_loss_is_the_mean_over_labels_and_padding_changes_nothing(llama):
    rows = [([5, 6, 7, 8], [-100, -100, 7, 8]), ([9, 10, 11, 12, 13, 14], [-100] * 5 + [14])]
    total, count = 0.0, 0
    for ids, labels in rows:  # one row at a time, no padding, all logits
        logits = llama(torch.tensor([ids])).logits[0, :-1]
        total += F.cross_entropy(logits, torch.tensor(labels[1:]), ignore_index=-100, reduction="sum")
        count += sum(label != -100 for label in labels)
    for filler in ([], [([3] * 20, [-100] * 19 + [3])]):
        batch = collate(rows + filler, list(range(2 + len(filler))), pad_id=0)
        if filler:
            batch["labels"][2] = -100  # a row of padding length only
        torch.testing.assert_close(label_loss(llama, batch), total / count)


def test_logits_are_computed_for_the_labels_columns_only(llama):
    batch = collate([([5, 6, 7, 8, 9], [-100, -100, -100, 8, 9]), ([5, 6, 7], [-100, -100, 7])], [0, 1], 0)
    sizes = []
    llama.lm_head.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape))
    logits, labels = label_logits(llama, batch)
    assert sizes == [(2, 3, 50)] and logits.shape == (2, 2, 50) and labels.tolist() == [[8, 9], [-100, 7]]


def test_the_head_gets_a_copy_of_the_columns(llama):
    """Torch multiplies a view across the rows by the head once for each row: twice the time of a step in bfloat16."""
    seen = []
    llama.lm_head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].is_contiguous()))
    label_loss(llama, make_batch())
    assert seen == [True]


def test_a_batch_without_labels_is_refused(llama):
    batch = collate([([5, 6], [-100, -100])], [0], 0)
    with pytest.raises(ValueError, match="no label is left"):
        label_loss(llama, batch)


def test_gpt2s_positions_do_not_count_the_padding():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=1, n_head=2)).eval()
    row = ([5, 6, 7, 8], [-100, -100, 7, 8])
    alone, beside = collate([row], [0], 0), collate([row, ([9] * 9, [-100] * 9)], [0, 1], 0)
    torch.testing.assert_close(label_loss(model, alone), label_loss(model, beside))
    logits = model(alone["input_ids"]).logits[0, 1:3]  # its positions are absolute, and begin at 0
    torch.testing.assert_close(label_loss(model, alone), F.cross_entropy(logits, torch.tensor([7, 8])))


def test_the_parts_of_a_batch_add_up_to_it(llama, batch):
    """With `label_count`, the labels of the whole: loss and gradients, in parts with different numbers of labels."""
    parameters = [llama.model.layers[0].mlp.up_proj.weight, llama.lm_head.weight]
    whole = label_loss(llama, batch)
    count = (batch["labels"] != -100).sum()
    parts = [{key: tensor[rows] for key, tensor in batch.items()} | {"label_count": count}
             for rows in ([3], [0, 4], [1, 2, 5])]
    assert len({int((part["labels"] != -100).sum()) for part in parts}) == 3
    losses = [label_loss(llama, part) for part in parts]
    torch.testing.assert_close(sum(losses), whole)
    torch.testing.assert_close(torch.autograd.grad(sum(losses), parameters), torch.autograd.grad(whole, parameters),
                               atol=1e-6, rtol=1e-4)


def test_a_label_in_the_first_column_is_left_out(llama):
    """Nothing stands before it."""
    ids = torch.tensor([[5, 6, 7]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "task_ids": torch.tensor([0])}
    logits, labels = label_logits(llama, batch)
    assert labels.tolist() == [[6, 7]]
    torch.testing.assert_close(logits, llama(ids).logits[:, :-1])


def test_the_loss_is_in_float32_beside_a_half_precision_model(llama):
    loss = label_loss(llama.to(torch.bfloat16), make_batch())
    assert loss.dtype == torch.float32


def test_forward_asks_for_what_the_model_can_do_and_keeps_no_cache(llama):
    batch = make_batch()
    output = forward(llama, batch["input_ids"], batch["attention_mask"], 3)
    assert output.logits.shape == (6, 3, 50) and output.past_key_values is None
    torch.testing.assert_close(output.logits, llama(**{key: batch[key] for key in ("input_ids", "attention_mask")},
                                                    position_ids=positions(batch)).logits[:, -3:])
    assert forward(llama, batch["input_ids"], batch["attention_mask"], 99, use_cache=True).past_key_values is not None


def positions(batch):
    """0, 1, 2, ... from the first real token of each row, by a loop."""
    rows = []
    for mask in batch["attention_mask"].tolist():
        padding = mask.count(0)
        rows.append([0] * padding + list(range(len(mask) - padding)))
    return torch.tensor(rows)


def test_a_model_without_positions_or_a_choice_of_logits_is_called_without():
    class Plain(torch.nn.Module):
        def forward(self, input_ids, attention_mask, use_cache):
            return input_ids, attention_mask, use_cache
    ids = torch.ones(2, 3)
    assert forward(Plain(), ids, ids, 1) == (ids, ids, False)
