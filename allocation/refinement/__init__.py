"""The closed loop: measure plans, correct the costs, propose better plans."""
