"""What a model's work is, what it costs, what a patch would change: inspect, plan, bench."""
