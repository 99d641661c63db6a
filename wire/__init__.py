"""What both ends of a lookup agree on: ids, errors, the plan, configuration loading, frames."""
