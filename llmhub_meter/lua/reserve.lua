--[[
  Set credits aside for one request.

  KEYS[1] wallet  hash    balance, held, promo, seq, status
  ARGV[1]  request id      ARGV[2] account      ARGV[3] model
  ARGV[4]  fixed part in ticks (input, flat fees)
  ARGV[5]  rate of output: ticks per 1,000 units
  ARGV[6]  units wanted    ARGV[7] fewest units that make sense
  ARGV[8]  share of what is available that output may take, per mille
  ARGV[9]  ticks that must be available for the fixed part to be taken as it is; with less: "count"
  ARGV[10] lease in milliseconds
  ARGV[11] "free" or "paid"
  ARGV[12] hash of the client's idempotency key, or ""    ARGV[13] digest of what it was sent with

  Returns {status, amount, granted units, balance, held, promo}; with the idem_ words the amount is the id of
    the request that the idempotency key stands for
  status: ok, exists (this id holds already), ended (it ended before), no_account, suspended,
    insufficient, held (only the account's own holds stand in the way), count (count the input and come again),
    idem_running (its request holds still), idem_charged (it was charged), idem_mismatch (with another body)
]]
--@include partition
--@include entry
--@include expire
local wallet, id, account = KEYS[1], ARGV[1], ARGV[2]

local function answer(status, amount, granted)
  return {status, amount, granted, figures(wallet)}
end

local earlier = redis.call("HGET", HOLDS, id)
if earlier then
  local amount, granted = string.match(earlier, "^(%S+) (%S+)")
  return answer("exists", amount, granted)
end
if redis.call("HEXISTS", done_of(id), id) == 1 then return answer("ended", "0", "0") end

local now = now_ms()
expire_some(now, 16)

local fixed, rate = tonumber(ARGV[4]), tonumber(ARGV[5])
local want, least, share = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])

local function cost(units)
  return math.ceil(units * rate / 1000)
end

local function available()
  local found = redis.call("HMGET", wallet, "balance", "held", "status")
  return found[1] and tonumber(found[1]), tonumber(found[2] or "0"), found[3]
end

local balance, held, status = available()
if not balance then return {"no_account", "0", "0", "0", "0", "0"} end
if status == "suspended" then return answer("suspended", "0", "0") end

local idem = ARGV[12] ~= "" and idem_of(account, ARGV[12])
if idem then
  local first, body, charge = unpack(redis.call("HMGET", idem, "request", "body", "charge"))
  local packed = first and not charge and redis.call("HGET", HOLDS, first)
  if packed and tonumber(redis.call("ZSCORE", LEASES, first) or "0") <= now then
    -- Its worker died, and nobody swept yet.
    expire(first, packed)
    balance, held = available()
    packed = nil
  end
  -- A request that ended uncharged, however it ended, has freed its key.
  if charge or packed then
    if body ~= ARGV[13] then return answer("idem_mismatch", first, "0") end
    if charge then return answer("idem_charged", first, "0") end
    return answer("idem_running", first, "0")
  end
end

local amount, granted = 0, want
if ARGV[11] == "paid" then
  if balance - held < fixed + cost(least) and expire_some(now, 1000, account) > 0 then
    balance, held = available()
  end
  if balance <= 0 then return answer("insufficient", "0", "0") end
  local free = balance - held
  local rich = tonumber(ARGV[9])
  -- Holds above the balance leave less than nothing, for which an exact input must not be counted again.
  if rich > 0 and free < rich then return answer("count", "0", "0") end
  -- Rounding up the cost of units must not lift it above what is there.
  if rate > 0 then
    local affordable = math.floor((free - fixed) * 1000 / rate)
    if cost(affordable) > free - fixed then affordable = affordable - 1 end
    local portion = math.floor(free * share / rate)
    granted = math.min(want, math.max(least, portion), affordable)
  end
  amount = fixed + cost(math.max(granted, least))
  if balance < amount then return answer("insufficient", "0", "0") end
  if free < amount then return answer("held", "0", "0") end
end

amount = string.format("%.0f", amount)
granted = string.format("%.0f", granted)
redis.call("HSET", HOLDS, id, amount .. " " .. granted .. " " .. account .. " " .. ARGV[3])
redis.call("ZADD", LEASES, string.format("%.0f", now + tonumber(ARGV[10])), id)
redis.call("HINCRBY", wallet, "held", amount)
if idem then
  redis.call("HSET", idem, "request", id, "body", ARGV[13])
  redis.call("EXPIRE", idem, IDEMPOTENCY_SECONDS)
end
return answer("ok", amount, granted)
