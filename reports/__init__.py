"""Tables, costs, figures and the page of runs."""
