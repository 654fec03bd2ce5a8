"""The models for classification and question answering: transformers' heads on the family's decoder."""

from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)

from loglinear.models.modeling import LogLinearPreTrainedModel


class LogLinearHead(LogLinearPreTrainedModel):
    """The base of these models: the loss is a mean over a batch, so Trainer must average accumulated batches."""

    accepts_loss_kwargs = False


class LogLinearForSequenceClassification(GenericForSequenceClassification, LogLinearHead):
    """A classifier of rows, which reads each row's last token that is not padding; also the form of reward models."""


class LogLinearForTokenClassification(GenericForTokenClassification, LogLinearHead):
    """A classifier of tokens."""


class LogLinearForQuestionAnswering(GenericForQuestionAnswering, LogLinearHead):
    """A model that predicts the first and the last token of the answer in each row."""
