-- Returns one hold whose lease ran out, and says so in the ledger.
local function expire(id, packed)
  local amount, _, account = string.match(packed, "^(%S+) (%S+) (%S+)")
  local wallet = wallet_of(account)
  end_hold(wallet, id, amount)
  local balance = redis.call("HGET", wallet, "balance") or "0"
  local entry = append(wallet, account, id, "expire", "0", "0", amount, "0", balance, "{}")
  remember(id, "expired 0 " .. entry)
end

-- Expires up to `limit` holds of the partition, or with `only` those of one account among the first `limit`.
local function expire_some(now, limit, only)
  local ids = redis.call("ZRANGEBYSCORE", LEASES, "-inf", now, "LIMIT", 0, limit)
  local count = 0
  for _, id in ipairs(ids) do
    local packed = redis.call("HGET", HOLDS, id)
    if not packed then
      redis.call("ZREM", LEASES, id)
    elseif not only or string.match(packed, "^%S+ %S+ (%S+)") == only then
      expire(id, packed)
      count = count + 1
    end
  end
  return count
end
