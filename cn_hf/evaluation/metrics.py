"""Classification metrics as ``evaluate.Metric`` classes that ship with the package and need no network.

They work wherever metrics of ``evaluate`` do: ``compute`` at once or ``add_batch`` by ``add_batch``, several of them in
``evaluate.combine``, across processes with ``num_process`` and ``process_id``, and from transformers' ``Trainer``
through :func:`trainer_compute_metrics`. Built with ``contexts``, each also answers per context.

Accuracy, precision, recall and F1 are scikit-learn's. Top-k is counted by :mod:`cn_hf.evaluation.ranking` instead of
scikit-learn's ``top_k_accuracy_score``, which refuses two columns for two classes, refuses NaN, and orders ties
against ``argmax``.

Shapes: predictions (N,) class ids or (N, C) scores, references (N,) class ids, context_ids (N,) ids in 0..T-1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import evaluate
import numpy as np
import torch
from datasets import Features, Value
from datasets import Sequence as SequenceFeature
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from cn_hf.errors import ConfigError, ContextIdError, DatasetError, InputTypeError
from cn_hf.evaluation.ranking import label_ranks, top_k_correct

__all__ = ["Accuracy", "ContextMetric", "MacroPrecisionRecallF1", "TopKAccuracy", "trainer_compute_metrics"]

_INPUTS_DESCRIPTION = """
Args:
    predictions: (N,) predicted class ids, or (N, C) scores (logits or probabilities).
    references: (N,) true class ids.
    context_ids: (N,) context of each sample, where the metric was built with contexts.
"""


class ContextMetric(evaluate.Metric):  # type: ignore[misc]  # evaluate is untyped
    """Base of the metrics here: a number over all samples, and one per context where contexts are declared.

    Args:
        contexts: number of contexts, or their names. Declaring them makes ``context_ids`` a required input, gathered
            over processes as predictions are, and adds results named ``<metric>/<context name>``. A context without
            samples has no such entry. Undeclared contexts are never reported.
        config_name: distinguishes cache files of metrics that run at the same time; the default names the options.
        options: further options of ``evaluate.Metric``: ``num_process``, ``process_id``, ``experiment_id``,
            ``cache_dir``, ``keep_in_memory``, ``seed``, ``timeout``.

    Raises:
        ConfigError: contexts are fewer than one, or two share a name.
    """

    summary = ""
    accepts_class_ids = True

    def __init__(
        self, *, contexts: int | Sequence[str] | None = None, config_name: str | None = None, **options: Any
    ) -> None:
        self.context_names = _context_names(contexts)
        default_name = "default" if contexts is None else f"{len(self.context_names)}_contexts"
        super().__init__(config_name=config_name or default_name, **options)

    def _info(self) -> evaluate.MetricInfo:
        columns = {"references": Value("int64")}
        if self.context_names:
            columns["context_ids"] = Value("int64")
        # Class ids travel as floats so that a float that is no class id is seen and refused, not truncated to one.
        kinds = [Value("float64")] if self.accepts_class_ids else []
        kinds.append(SequenceFeature(Value("float32")))
        features = [Features({"predictions": kind, **columns}) for kind in kinds]
        return evaluate.MetricInfo(
            description=self.summary, citation="", inputs_description=_INPUTS_DESCRIPTION, features=features
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, context_ids: Any = None) -> None:
        """Add a batch: (N,) class ids or (N, C) scores, (N,) true class ids and, with contexts, (N,) context ids.

        Raises:
            DatasetError: there is no sample, or the numbers of predictions, references and context ids differ.
            ContextIdError: the metric has contexts and got no ids.
        """
        batch = {"predictions": predictions, "references": references}
        if self.context_names:
            if context_ids is None:
                raise ContextIdError(
                    f"{type(self).__name__} was built with {len(self.context_names)} contexts and got no context_ids; "
                    "pass context_ids (N,), or build it without contexts"
                )
            batch["context_ids"] = context_ids
        missing = [name for name, column in batch.items() if column is None]
        if missing:
            raise DatasetError(f"{type(self).__name__} got no {' and no '.join(missing)}; pass one for each sample")
        lengths = {name: len(column) for name, column in batch.items()}
        if len(set(lengths.values())) != 1 or lengths["references"] == 0:
            received = ", ".join(f"{length} {name}" for name, length in lengths.items())
            raise DatasetError(f"{type(self).__name__} needs the same number of each, at least one; got {received}")
        super().add_batch(**batch)

    def _compute(self, *, predictions: Any, references: Any, context_ids: Any = None) -> dict[str, float]:
        labels = np.asarray(references, dtype=np.int64)
        answers = _answers(predictions)
        _check_labels(labels, answers)
        results = self._scores(answers, labels)
        if not self.context_names:
            return results
        ids = np.asarray(context_ids, dtype=np.int64)
        outside = (ids < 0) | (ids >= len(self.context_names))
        if outside.any():
            raise ContextIdError(
                f"context id {ids[outside][0]} in a metric with {len(self.context_names)} contexts; "
                f"ids are 0..{len(self.context_names) - 1}"
            )
        for context, name in enumerate(self.context_names):
            chosen = ids == context
            if chosen.any():
                scores = self._scores(answers[chosen], labels[chosen])
                results |= {f"{metric}/{name}": value for metric, value in scores.items()}
        return results

    def _scores(self, answers: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> dict[str, float]:
        """Results over some samples: answers are (N,) int64 class ids or (N, C) float scores, labels (N,) int64."""
        raise NotImplementedError


class Accuracy(ContextMetric):
    """Fraction of samples whose predicted class (or highest score) is the true one: ``{"accuracy": ...}``.

    Example:
        >>> Accuracy().compute(predictions=[0, 1, 1, 0], references=[0, 1, 0, 1])
        {'accuracy': 0.5}
    """

    summary = "Fraction of samples whose predicted class is the true one, over all samples and per context."

    def _scores(self, answers: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(labels, _class_ids(answers)))}


class TopKAccuracy(ContextMetric):
    """Fraction of samples whose true class is among the k highest scores: ``{"top_<k>_accuracy": ...}``.

    Ties go to the lower class index. ``k`` at or above the number of classes asks for all. Rows with NaN are wrong.

    Args:
        k: number of guesses, at least 1.
        contexts: as in :class:`ContextMetric`.
        config_name: as in :class:`ContextMetric`; the default names ``k``, so that several k can run side by side.
        options: as in :class:`ContextMetric`.

    Raises:
        ConfigError: ``k`` is not a positive integer.
    """

    summary = "Fraction of samples whose true class is among the k highest scores, over all samples and per context."
    accepts_class_ids = False

    def __init__(
        self,
        k: int = 5,
        *,
        contexts: int | Sequence[str] | None = None,
        config_name: str | None = None,
        **options: Any,
    ) -> None:
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ConfigError(f"k={k!r} for a top-k accuracy; it must be an integer of at least 1")
        self.k = k
        default_name = f"top_{k}" if contexts is None else f"top_{k}_{len(_context_names(contexts))}_contexts"
        super().__init__(contexts=contexts, config_name=config_name or default_name, **options)

    def _scores(self, answers: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> dict[str, float]:
        if answers.ndim != 2:
            raise InputTypeError(f"top-{self.k} accuracy got class ids; pass the scores of all classes, (N, C)")
        ranks = label_ranks(torch.from_numpy(answers), torch.from_numpy(labels))
        correct = top_k_correct(ranks, answers.shape[1], self.k)
        return {f"top_{self.k}_accuracy": float(correct.double().mean())}


class MacroPrecisionRecallF1(ContextMetric):
    """Precision, recall and F1, each averaged over classes with equal weight.

    Gives ``{"precision": ..., "recall": ..., "f1": ...}``.

    Averaged over the classes that occur among the samples at hand, true or predicted, as scikit-learn does; a class
    never predicted has precision 0, one never true has recall 0.
    """

    summary = "Precision, recall and F1 averaged over classes, over all samples and per context."

    def _scores(self, answers: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> dict[str, float]:
        precision, recall, f1, _ = precision_recall_fscore_support(
            labels, _class_ids(answers), average="macro", zero_division=0
        )
        return {"precision": float(precision), "recall": float(recall), "f1": float(f1)}


def trainer_compute_metrics(metric: Any) -> Callable[..., dict[str, float]]:
    """Wrap a metric, or several from ``evaluate.combine``, as the ``compute_metrics`` of transformers' ``Trainer``.

    Per-context metrics need the ids beside the labels: ``TrainingArguments(label_names=["labels", "context_ids"])``
    makes Trainer hand both over (the model still receives both). Works with ``batch_eval_metrics`` as well.

    Args:
        metric: a metric of this module, or ``evaluate.combine([...])`` of them.

    Returns:
        A function of Trainer's ``EvalPrediction`` (and its ``compute_result`` flag) giving the results.
    """

    def compute_metrics(prediction: Any, compute_result: bool = True) -> dict[str, float]:
        scores, labels = prediction.predictions, prediction.label_ids
        if isinstance(scores, tuple):  # logits come first; hidden states and the like may follow
            scores = scores[0]
        batch = {"predictions": scores}
        if isinstance(labels, tuple):
            batch["references"], batch["context_ids"] = labels
        else:
            batch["references"] = labels
        metric.add_batch(**batch)
        if not compute_result:
            return {}
        results: Mapping[str, float] = metric.compute()
        return dict(results)

    return compute_metrics


def _context_names(contexts: int | Sequence[str] | None) -> tuple[str, ...]:
    if contexts is None:
        return ()
    if isinstance(contexts, str) or (not isinstance(contexts, int) and not all(isinstance(c, str) for c in contexts)):
        raise ConfigError(f"contexts={contexts!r}; pass how many there are, or a list of their names")
    names = tuple(f"context_{index}" for index in range(contexts)) if isinstance(contexts, int) else tuple(contexts)
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"contexts={contexts!r}; there must be at least one, and all names must differ")
    return names


def _answers(predictions: Any) -> np.ndarray[Any, Any]:
    """(N,) int64 class ids, or (N, C) float32 scores; anything else is refused."""
    try:
        answers = np.asarray(predictions)
    except ValueError as error:
        raise InputTypeError("predictions have rows of different lengths; pass (N, C) scores of one network") from error
    if answers.ndim == 2:
        return answers.astype(np.float32)
    class_ids = answers.astype(np.int64)
    if answers.ndim != 1 or not np.array_equal(class_ids, answers):
        raise InputTypeError(
            f"predictions of shape {answers.shape} are no class ids; pass integers (N,), or all classes' scores (N, C)"
        )
    return class_ids


def _class_ids(answers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Predicted classes; -1, which is no class, for rows of scores holding a NaN."""
    if answers.ndim == 1:
        return answers
    predicted: np.ndarray[Any, Any] = np.where(np.isnan(answers).any(axis=1), -1, answers.argmax(axis=1))
    return predicted


def _check_labels(labels: np.ndarray[Any, Any], answers: np.ndarray[Any, Any]) -> None:
    if labels.min() < 0:
        raise DatasetError(f"label {labels.min()} among the references; classes count from 0")
    if answers.ndim == 2 and labels.max() >= answers.shape[1]:
        raise DatasetError(
            f"label {labels.max()} among the references, but each prediction has {answers.shape[1]} scores; "
            f"labels must be 0..{answers.shape[1] - 1}"
        )
