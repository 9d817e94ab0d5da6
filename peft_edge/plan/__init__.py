"""What fits a budget, before anything is trained."""

from peft_edge.plan.budget import Budget
from peft_edge.plan.search import LORA_RANKS, METHODS_TO_PLAN, PLACEMENTS, Candidate, Plan, find_plan
from peft_edge.plan.table import plan_table

__all__ = ["LORA_RANKS", "METHODS_TO_PLAN", "PLACEMENTS", "Budget", "Candidate", "Plan", "find_plan", "plan_table"]
