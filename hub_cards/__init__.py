"""Model cards and pushes, imported as `hf_imitate.hub_cards`; needs no torch.

Import what you need from its modules: `facts` (what a card may say), `model_card` (the words), `push` (the Hub).
"""
