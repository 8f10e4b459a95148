--[[
  Take the exact charge of a request; the rest of its hold returns.

  KEYS[1] wallet  hash    balance, held, promo, seq
  ARGV[1] request id      ARGV[2] account      ARGV[3] charge in ticks      ARGV[4] record, JSON
  ARGV[5] hash of the client's idempotency key, or ""

  Returns {status, how, charge, balance, held, promo}
  status: ok, late (charged, now or before, though the hold had expired or was never seen),
    exists (it ended before: how), no_account (nothing was changed)
]]
--@include partition
--@include entry
local wallet, id, account, charge = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
local packed = redis.call("HGET", HOLDS, id)
local amount, late = "0", "1"
if packed then
  amount, late = string.match(packed, "^(%S+)"), "0"
  end_hold(wallet, id, amount)
else
  local ended = redis.call("HGET", done_of(id), id)
  if ended then
    local how, earlier, was_late = string.match(ended, "^(%S+) (%S+) %S+ ?(%S*)")
    -- An expired hold was returned uncharged; what was used is still owed, once.
    if how ~= "expired" then
      return {was_late == "1" and "late" or "exists", how, earlier, figures(wallet)}
    end
  end
  -- Of an account that had a hold, only lost data leaves nothing: a wallet made here would block its return.
  if redis.call("EXISTS", wallet) == 0 then return {"no_account", "", "0", "0", "0", "0"} end
end

local promo = tonumber(redis.call("HGET", wallet, "promo") or "0")
local given = "0"
if charge ~= "0" then
  redis.call("HINCRBY", wallet, "balance", minus(charge))
  if promo > 0 then
    -- Grants are spent before paid credits.
    given = string.format("%.0f", math.min(promo, tonumber(charge)))
    redis.call("HINCRBY", wallet, "promo", minus(given))
  end
end
local balance = redis.call("HGET", wallet, "balance") or "0"
local entry = append(wallet, account, id, "charge", minus(charge), minus(given), amount, late, balance, ARGV[4])
remember(id, "settled " .. charge .. " " .. entry .. " " .. late)
if ARGV[5] ~= "" and charge ~= "0" then
  -- After an expired hold the key may stand for another request by now.
  local idem = idem_of(account, ARGV[5])
  if redis.call("HGET", idem, "request") == id then
    redis.call("HSET", idem, "charge", charge)
    redis.call("EXPIRE", idem, IDEMPOTENCY_SECONDS)
  end
end
return {late == "1" and "late" or "ok", "settled", charge, figures(wallet)}
