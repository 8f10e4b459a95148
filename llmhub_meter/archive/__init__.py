"""What follows the ledger: proofs over it and, behind the extras, its way into SQL."""
