"""What finished runs show: tables, figures, the report, and the paper's printed numbers beside them."""
