-- One ledger entry, in the same call as the change that it records.
local REMEMBERED_SECONDS = 1200
local IDEMPOTENCY_SECONDS = 86400

-- "-0" is no integer to Redis.
local function minus(amount)
  return amount == "0" and "0" or "-" .. amount
end

local function now_ms()
  local time = redis.call("TIME")
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

-- An entry has the same fields whatever its code. `promo` is the change of the given part of the balance,
-- `held` the hold that ended, `late` whether the charge found no live hold. Returns the entry's stream id.
local function append(wallet, account, id, code, amount, promo, held, late, balance, data)
  local seq = redis.call("HINCRBY", wallet, "seq", 1)
  local n = redis.call("HINCRBY", HEAD, "sequence", 1)
  return redis.call("XADD", LEDGER, "*", "id", id, "account", account, "code", code, "amount", amount,
    "promo", promo, "held", held, "late", late, "balance", balance, "seq", seq, "n", n,
    "at", string.format("%.0f", now_ms()), "data", data)
end

-- Remembers how an id ended; the hash lives on for 20 minutes after its last end.
local function remember(id, value)
  local done = done_of(id)
  redis.call("HSET", done, id, value)
  redis.call("EXPIRE", done, REMEMBERED_SECONDS)
end

-- A hold is over: what it set aside returns. How it ended is said by an entry.
local function end_hold(wallet, id, amount)
  redis.call("HDEL", HOLDS, id)
  redis.call("ZREM", LEASES, id)
  redis.call("HINCRBY", wallet, "held", minus(amount))
end

local function figures(wallet)
  local found = redis.call("HMGET", wallet, "balance", "held", "promo")
  return found[1] or "0", found[2] or "0", found[3] or "0"
end
