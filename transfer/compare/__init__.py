"""``mae compare``: encoders x tasks x seeds with equal budgets, and one report of them."""
