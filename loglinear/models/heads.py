"""Heads other than the language model's: transformers' own, on the family's decoder."""

from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)

from loglinear.models.modeling import LogLinearPreTrainedModel


class LogLinearHead(LogLinearPreTrainedModel):
    """What the heads have in common: each batch's loss is a mean, so Trainer must average over accumulated ones."""

    accepts_loss_kwargs = False


class LogLinearForSequenceClassification(GenericForSequenceClassification, LogLinearHead):
    """One prediction for each row, read at its last token that is not padding; also the form of reward models."""


class LogLinearForTokenClassification(GenericForTokenClassification, LogLinearHead):
    """One prediction for each token."""


class LogLinearForQuestionAnswering(GenericForQuestionAnswering, LogLinearHead):
    """Where in each row an answer begins and ends."""
