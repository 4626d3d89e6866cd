"""The Hub: may we upload there, the model card, one folder in one commit, and whether what arrived is what was sent."""
