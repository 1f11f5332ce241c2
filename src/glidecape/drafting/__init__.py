"""Making proposals: how nodes are added (expansion), when drafting ends (stop), and the drafter that runs both."""
