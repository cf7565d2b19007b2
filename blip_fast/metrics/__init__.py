"""How good a model is: functions of scores, token ids and models, without files."""
