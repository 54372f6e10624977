"""Scoring: greedy answers, likelihoods of labels, and exact match."""

import pytest
import torch
import torch.nn.functional as F
from conftest import make_llama
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GenerationConfig, PreTrainedTokenizerFast

from tinylora_mtl import AdapterConfig, add_adapters
from tinylora_mtl.batching import encode_target
from tinylora_mtl.data.tasks import load_tasks
from tinylora_mtl.evaluate import (EXTRA_TOKENS, accuracy, evaluation_mode, generate_answers, is_right, length_buckets,
                                   prompt_batch)
from tinylora_mtl.run.models import load_model
from tinylora_mtl.run.ranking import choose_answers, log_likelihoods


@pytest.mark.parametrize("answer,target,right", [
    (" Yes", "Yes", True), ("Yes\nNo", "Yes", True), ("ant  axe", "ant axe", True), ("yes.", "Yes", True),
    ("No", "Yes", False), ("Yes No", "Yes", False), ("", "Yes", False), ("None\nYes", "Yes", False),
    ("\nYes", "Yes", False), ("No\nAnswer: Yes", "Yes", False), ("I think Yes", "Yes", False),
    ("none", "1", False), ("1", "none", False), ("12", "1", False), ("1 2", "12", False), ("1", "11", False),
    ("1,234", "1234", True), ("1,234", "1,234", True), ("1234", "1,234", True), ("1", "1,234", False),
    ("234", "1,234", False), ("1,2", "12", False), ("1,234,567.0", "1234567", True),
    ("-5", "-5", True), ("5", "-5", False), ("-5", "5", False), ("-5.0", "-5", True), ("- 5", "-5", False),
    ("3.50", "3.5", True), ("3.50", "3.50", True), ("3", "3.50", False), ("3.05", "3.5", False), ("3.", "3", True),
    ("(B)", "B", True), ("B", "(B)", True), ("(b)", "(B)", True), ("(A)", "B", False), ("(A) (B)", "B", False),
    ("A", "(B)", False), ("B) x", "B", False), (") ]", ") ]", True), (") ]", "] )", False), ("( )", "", False),
    ("100", "1E2", False), ("not_entailment", "entailment", False), ("0", "-0", True), ("007", "7", False),
    ("0110", "110", False), ("", ".", False), (".", ".", True), ("12345678901234567890123456789012", "1" * 32, False),
    ("12345678901234567890123456789012", "12345678901234567890123456789013", False)])
def test_normalized_exact_match(answer, target, right):
    assert is_right(answer, target) is right


def script(model, tokenizer, text):
    """Make a model write `text`, whatever it is asked; returns the list of its forward passes' sizes."""
    ids, calls = tokenizer(text, add_special_tokens=False)["input_ids"], []

    def write(module, inputs, logits):
        forced = torch.full_like(logits, -100.0)
        forced[:, -1, ids[min(len(calls), len(ids) - 1)]] = 0.0
        calls.append(logits.shape)
        return forced
    model.lm_head.register_forward_hook(write)
    return calls


@pytest.mark.parametrize("written,answer,passes", [
    (" Yes\nAnswer: No\nAnswer: No", "Yes", 2), ("\nYes", "", 1), (" Yes<pad> No", "Yes", None),
    (" Yes No No No No No No No No No", "Yes No No No No No …", None)])
def test_nothing_invented_after_the_answer_is_read(written, answer, passes):
    """Writing stops at the first line break, in the middle of what the model would go on to invent."""
    model, tokenizer, _ = load_model("mini", "cpu")
    calls = script(model, tokenizer, written)
    got = generate_answers(model, tokenizer, [("navigate Answer:", "Yes"), ("word Answer:", "No")])
    assert got == [answer] * 2
    assert len(calls) == (passes or 2 + EXTRA_TOKENS)  # " Yes" and its end token, and the slack


def test_an_answer_that_is_cut_off_is_never_right():
    """' 3.0000000' breaks off after '3.000', which would be the number 3."""
    model, tokenizer, _ = load_model("mini", "cpu")
    script(model, tokenizer, " 3.00000000000001")
    answer, = generate_answers(model, tokenizer, [("x Answer:", "3")])
    assert answer.startswith("3.0") and answer.endswith(" …") and not is_right(answer, "3")


def test_the_end_of_a_chat_models_turn_ends_its_answer():
    model, tokenizer, _ = load_model("mini", "cpu")
    no = tokenizer(" No", add_special_tokens=False)["input_ids"][0]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, no]
    calls = script(model, tokenizer, " Yes No Yes Yes Yes")
    assert generate_answers(model, tokenizer, [("x Answer:", "Yes")]) == ["Yes"] and len(calls) == 2


def test_prompts_give_way_to_the_targets_of_their_own_batch_only():
    """One long target among short ones, as training has it."""
    model, tokenizer, _ = load_model("mini", "cpu")
    prompts = []
    model.model.register_forward_pre_hook(lambda module, args, kwargs: prompts.append(kwargs["input_ids"].shape),
                                          with_kwargs=True)
    long, short = "word " * 10 + "Answer:", "word " * 7 + "Answer:"
    samples = [(long, "x"), (long, "x"), (short, "word " * 12)]
    whole, left = (len(tokenizer(prompt)["input_ids"]) for prompt in (long, short))
    target = len(encode_target(tokenizer, samples[2][1]))
    longest = target + EXTRA_TOKENS + left  # what is left where the long target is
    generate_answers(model, tokenizer, samples, longest, batch_size=2)
    read = [length for _, length in prompts if length > 1]
    assert read == [left, whole] and whole > left


def test_likelihoods_that_are_not_finite_choose_nothing():
    model, tokenizer, _ = load_model("mini", "cpu")
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits * float("nan"))
    for answer in (lambda *given: choose_answers(*given, ("No", "Yes")), generate_answers):
        with pytest.raises(FloatingPointError, match="logits are not finite; .* try --dtype float32"):
            answer(model, tokenizer, [("x Answer:", "Yes")])


def test_a_token_that_can_never_come_is_no_fault():
    """Some models give -inf to tokens that are no text."""
    model, tokenizer, _ = load_model("mini", "cpu")
    samples, never = [("x Answer:", "Yes")], torch.tensor([0.0] * (len(tokenizer) - 1) + [-torch.inf])
    before = generate_answers(model, tokenizer, samples), choose_answers(model, tokenizer, samples, ("No", "Yes"))
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + never)
    assert (generate_answers(model, tokenizer, samples),
            choose_answers(model, tokenizer, samples, ("No", "Yes"))) == before


OWN_SETTINGS = [dict(suppress_tokens=[1]), dict(min_new_tokens=12), dict(return_dict_in_generate=True),
                dict(num_beams=3), dict(do_sample=True, temperature=5.0), dict(repetition_penalty=9.0), dict(forced_eos_token_id=5),
                dict(bad_words_ids=[[5]]), dict(no_repeat_ngram_size=1), dict(max_length=3), dict(max_time=1e-9),
                dict(sequence_bias=[[[5], 50.0]]), dict(begin_suppress_tokens=list(range(3, 200))),
                dict(stop_strings=["a", "e"]), dict(num_return_sequences=1, output_scores=True)]


@pytest.mark.parametrize("settings", OWN_SETTINGS, ids=str)
def test_the_models_own_generation_settings_change_no_answer(settings):
    model, tokenizer, _ = load_model("mini", "cpu")
    samples = [sample for task in load_tasks(["word_sorting", "navigate"]) for sample in task.test[:3]]
    expected = generate_answers(model, tokenizer, samples)
    own = model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=2, **settings)
    assert generate_answers(model, tokenizer, samples) == expected
    assert model.generation_config is own  # and they are as they were


def test_a_tokenizer_of_a_few_words_is_enough():
    """Of so few that it cannot write the letters by which libraries look for a line break."""
    words = {word: i for i, word in enumerate(["</s>", "<unk>", "a", "b", "yes", "no", ":", "\n"])}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")),
                                        eos_token="</s>", pad_token="</s>", unk_token="<unk>")
    tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    model = make_llama(vocab_size=len(words))
    answer, = generate_answers(model, tokenizer, [("a b :", "yes")])
    assert set(answer.removesuffix(" …").split()) <= set(words)
    model.lm_head.register_forward_hook(lambda module, inputs, logits: F.one_hot(torch.full(
        logits.shape[:-1], 7), len(words)).float())
    assert generate_answers(model, tokenizer, [("a b :", "yes")]) == [""]  # it ends at the line break


def test_the_models_own_end_tokens_count():
    model, tokenizer, _ = load_model("mini", "cpu")
    sample = ("sort ink cup bag =", "bag cup ink")  # as in pre-training, so that the answer has several words
    whole, = generate_answers(model, tokenizer, [sample])
    middle = tokenizer(f" {whole}", add_special_tokens=False)["input_ids"][1]
    model.generation_config.eos_token_id = [1, middle]
    assert generate_answers(model, tokenizer, [sample]) == [tokenizer.decode(
        tokenizer(f" {whole}", add_special_tokens=False)["input_ids"][:1]).strip()]


def test_the_chosen_label_is_the_likeliest_whole_answer():
    """Against one forward pass per label, without padding: Σ log p of the label's tokens and of the end token."""
    model, tokenizer, _ = load_model("mini", "cpu")
    torch.manual_seed(0)
    with torch.no_grad():  # a random model, so that no label is favoured by far
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    labels = ("Yes", "No", "1", "10", "axe pen cup", "1 0")
    samples = [(prompt, "Yes") for prompt, _ in load_tasks(["word_sorting"])[0].test[:12]]
    expected = []
    for prompt, _ in samples:
        start, scores = tokenizer(prompt)["input_ids"], []
        for label in labels:
            option = encode_target(tokenizer, label)
            logits = model(torch.tensor([start + option])).logits[0].log_softmax(-1)
            scores.append(sum(logits[len(start) + i - 1, token].item() for i, token in enumerate(option)))
        expected.append(labels[scores.index(max(scores))])
    model.train()
    assert choose_answers(model, tokenizer, samples, labels, batch_size=13) == expected
    assert model.training and len(set(expected)) > 1
    assert choose_answers(model, tokenizer, samples, labels, max_length=12) != expected  # the prompts are cut


def test_nothing_is_dropped_while_scoring():
    """A model that is in training mode answers as in evaluation mode, time after time."""
    model, tokenizer, _ = load_model("mini", "cpu")
    add_adapters(model, AdapterConfig("rlora", dropout=0.5))
    samples = load_tasks(["navigate"])[0].test[:20]
    prompts = prompt_batch(model, tokenizer, [prompt for prompt, _ in samples], 200)
    found = []
    for training in (False, True, True):
        model.train(training)
        with evaluation_mode(model):
            found.append(log_likelihoods(model, prompts, [[5, 1], [6, 1]]))
        assert model.training is training
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])


@pytest.mark.parametrize("padded_with", ["<pad>", "the end token"])
def test_answers_are_the_greedy_ones_one_sample_at_a_time(padded_with):
    """Batched and padded on the left, the answers are those of a plain argmax loop without padding."""
    model, tokenizer, _ = load_model("mini", "cpu")
    if padded_with == "the end token":  # as for a tokenizer that has no other
        tokenizer.pad_token = tokenizer.eos_token
    samples = [sample for task in load_tasks(["word_sorting", "navigate"]) for sample in task.test[:4]]
    samples += [("sort ink cup bag =", "bag cup ink"), ("order hen axe =", "axe hen")]  # which it answers in any case
    found = []
    for (prompt, target), answer in zip(samples, generate_answers(model, tokenizer, samples, batch_size=5)):
        ids = tokenizer(prompt)["input_ids"]
        written = []
        while len(written) < len(encode_target(tokenizer, target)):
            token = model(torch.tensor([ids + written])).logits[0, -1].argmax().item()
            if token == tokenizer.eos_token_id:
                break
            written.append(token)
        expected = tokenizer.decode(written).split("\n")[0].strip()
        assert answer.startswith(expected) and bool(answer) == bool(expected)
        found.append(expected)
    assert len(set(found)) > 2


def test_the_models_own_way_of_generating_does_not_count():
    """A model may come with sampling, beams or penalties in its generation_config; answers are greedy all the same."""
    model, tokenizer, _ = load_model("mini", "cpu")
    samples = [*load_tasks(["word_sorting"])[0].test[:6], ("sort ink cup bag =", "bag cup ink"),
               ("order hen axe =", "axe hen")]
    answers = generate_answers(model, tokenizer, samples)
    own = dict(do_sample=True, temperature=9.0, num_beams=3, repetition_penalty=9.0, no_repeat_ngram_size=1,
               max_new_tokens=1, pad_token_id=7)
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    assert generate_answers(model, tokenizer, samples) == answers and len(set(answers)) > 1
    model.generation_config.eos_token_id = None
    assert generate_answers(model, tokenizer, samples) == answers


def test_prompts_of_like_length_are_read_together():
    """Every one once, at most `batch_size`, and none more than half as long again as another."""
    lengths = [40, 3, 10, 61, 59, 4, 40, 40, 60, 15, 16]
    lists = length_buckets([("x" * length, "y") for length in lengths], 3)
    assert sorted(sum(lists, [])) == list(range(len(lengths)))
    assert [[lengths[i] for i in chosen] for chosen in lists] == [[3, 4], [10, 15], [16], [40, 40, 40], [59, 60, 61]]
    assert length_buckets([], 3) == []


def test_long_prompts_are_scored_too():
    model, tokenizer, _ = load_model("mini", "cpu")
    long = ("word " * 400 + "order pen axe =", "axe pen")
    assert len(generate_answers(model, tokenizer, [long], max_length=64)) == 1


def test_accuracy_is_the_share_of_right_answers():
    samples = [("a", "1"), ("b", "2"), ("c", "3")]
    assert accuracy(["1", " 2.", "x"], samples) == pytest.approx(2 / 3)
    with pytest.raises(ValueError):  # no sample may get lost
        accuracy(["1", "2"], samples)


@pytest.mark.parametrize("training", [False, True])
def test_evaluation_mode_ends_as_it_began_also_after_an_error(llama, training):
    llama.train(training)
    with pytest.raises(KeyError):
        with evaluation_mode(llama) as model:
            assert model is llama and not model.training and not torch.is_grad_enabled()
            raise KeyError
    assert llama.training is training and torch.is_grad_enabled()
