"""The models for classification and question answering: transformers' heads on the family's decoder."""

from typing import Any

from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)

from loglinear.models.modeling import LogLinearPreTrainedModel


class LogLinearHead(LogLinearPreTrainedModel):
    """The base of these models: the loss is a mean over a batch, so Trainer must average accumulated batches."""

    accepts_loss_kwargs = False

    def __call__(self, *args: Any, slices: Any = None, **kwargs: Any) -> Any:
        """Call the model; ValueError for slices, because a part of a row has no logits of the row."""
        if slices is not None:
            raise ValueError(f"slices need a LogLinearForCausalLM or LogLinearModel, got {type(self).__name__}")
        return super().__call__(*args, **kwargs)


class LogLinearForSequenceClassification(GenericForSequenceClassification, LogLinearHead):
    """A classifier of rows, which reads each row's last token that is not padding; also the form of reward models."""


class LogLinearForTokenClassification(GenericForTokenClassification, LogLinearHead):
    """A classifier of tokens."""


class LogLinearForQuestionAnswering(GenericForQuestionAnswering, LogLinearHead):
    """A model that predicts the first and the last token of the answer in each row."""
