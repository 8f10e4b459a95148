--[[
  Change a balance: top-up, grant, refund, adjust.

  KEYS[1] wallet    hash    balance, held, promo, seq
  KEYS[2] credited  hash    credit id -> amount, code, balance after it, refunded request
  ARGV[1] credit id         ARGV[2] account      ARGV[3] amount in ticks, may be negative
  ARGV[4] code: top_up, grant, refund, adjust    ARGV[5] cap in ticks
  ARGV[6] record, JSON
  ARGV[7] refund: the request whose charge is given back, else ""
  ARGV[8] refund: that charge in ticks           ARGV[9] refund: the part of it that was spent from grants

  Returns {status, balance, held, promo, seen}; seen is the balance after the first call of this id
  status: ok, exists, conflict (this id was another amount, code or request), no_account, over_cap, over_charge
]]
--@include partition
--@include entry
local wallet, id, account, code = KEYS[1], ARGV[1], ARGV[2], ARGV[4]
local balance, held, promo = figures(wallet)
local function answer(status, seen)
  return {status, balance, held, promo, seen or balance}
end

local earlier = redis.call("HGET", KEYS[2], id)
if earlier then
  local amount, kind, seen, request = string.match(earlier, "^(%S+) (%S+) (%S+) ?(%S*)$")
  if amount ~= ARGV[3] or kind ~= code or request ~= ARGV[7] then return answer("conflict", seen) end
  return answer("exists", seen)
end
if redis.call("EXISTS", wallet) == 0 then return answer("no_account") end

local amount, cap = tonumber(ARGV[3]), tonumber(ARGV[5])
if math.abs(tonumber(balance) + amount) > cap then return answer("over_cap") end

local after_balance, given = math.max(0, tonumber(balance) + amount), 0
if code == "grant" then
  given = amount
elseif code == "refund" then
  local REFUNDS = slot .. "refunds"
  local before = tonumber(redis.call("HGET", REFUNDS, ARGV[7]) or "0")
  local after, charge = before + amount, tonumber(ARGV[8])
  if after > charge then return answer("over_charge") end
  -- The paid part of the charge is given back first, then what had been a gift.
  local paid = charge - tonumber(ARGV[9])
  given = math.max(0, after - paid) - math.max(0, before - paid)
  redis.call("HINCRBY", REFUNDS, ARGV[7], ARGV[3])
elseif code == "top_up" and amount > 0 then
  redis.call("HSET", wallet, "last_topup", ARGV[3])
end

redis.call("HINCRBY", wallet, "balance", ARGV[3])
-- The given part can't be more than the balance that is left (a grant pays a debt first), nor below nothing
-- (a grant that is taken back after it was spent takes paid credits).
given = math.max(0, math.min(tonumber(promo) + given, after_balance)) - tonumber(promo)
given = string.format("%.0f", given)
if given ~= "0" then redis.call("HINCRBY", wallet, "promo", given) end
balance, held, promo = figures(wallet)
redis.call("HSET", KEYS[2], id, ARGV[3] .. " " .. code .. " " .. balance .. " " .. ARGV[7])
append(wallet, account, id, code, ARGV[3], given, "0", "0", balance, ARGV[6])
return answer("ok")
